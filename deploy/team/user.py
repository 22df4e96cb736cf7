"""Accounts of the team's MLflow, made by its administrator.

    docker compose exec mlflow python user.py add ada         # prints a new password
    docker compose exec mlflow python user.py password ada    # a new one in place of a lost one
    docker compose exec mlflow python user.py remove ada

NEW_PASSWORD in the environment is taken in place of a random one. MLFLOW_TRACKING_URI: the server (this
container's own by default); the administrator is MLFLOW_AUTH_ADMIN_USERNAME with MLFLOW_AUTH_ADMIN_PASSWORD.
MLflow's own client does the same and takes ten seconds to import.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys

import requests

ROUTES = {"add": ("POST", "create"), "password": ("PATCH", "update-password"), "remove": ("DELETE", "delete")}
TIMEOUT_S = 60


def main() -> None:
    """Add, change or remove one account. Exit status 1 with the server's words if it refuses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=ROUTES)
    parser.add_argument("name")
    arguments = parser.parse_args()
    given = os.environ.get("NEW_PASSWORD")
    password = given or secrets.token_urlsafe(18)
    try:
        said = ask(arguments.what, arguments.name, password)
        if given and said == "RESOURCE_ALREADY_EXISTS":
            said = ask("password", arguments.name, password)
    except requests.RequestException as error:
        sys.exit(f"{arguments.name}: MLflow does not answer: {error}")
    if said == "RESOURCE_ALREADY_EXISTS":
        sys.exit(f"{arguments.name} has an account: `user.py password {arguments.name}` gives a new password")
    if said:
        sys.exit(f"{arguments.name}: {said}")
    shown = "" if given or arguments.what == "remove" else f", password {password}"
    print(f"{arguments.name}: {arguments.what}{shown}")


def ask(what: str, name: str, password: str) -> str:
    """One request as the administrator: why it was refused, or nothing."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    method, route = ROUTES[what]
    answer = requests.request(
        method,
        f"{server}/api/2.0/mlflow/users/{route}",
        json={"username": name} | ({"password": password} if what != "remove" else {}),
        auth=(os.environ["MLFLOW_AUTH_ADMIN_USERNAME"], os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]),
        timeout=TIMEOUT_S,
    )
    if answer.ok:
        return ""
    try:
        code, message = answer.json()["error_code"], answer.json()["message"]
    except ValueError:
        return f"status {answer.status_code}: {answer.text[:200]}"
    return code if code == "RESOURCE_ALREADY_EXISTS" else message


if __name__ == "__main__":
    main()
