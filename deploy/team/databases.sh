#!/bin/sh
# Makes the databases and their owners. PostgreSQL's image runs it once, when its volume is new.
#     PGHOST=… PGPASSWORD=… POSTGRES_USER=postgres MLFLOW_DB_PASSWORD=… PREFECT_DB_PASSWORD=… ./databases.sh
set -eu
psql --set ON_ERROR_STOP=1 --quiet --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv mlflow MLFLOW_DB_PASSWORD
\getenv prefect PREFECT_DB_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE prefect LOGIN PASSWORD :'prefect';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE prefect OWNER prefect;
REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, prefect FROM PUBLIC;
SQL
