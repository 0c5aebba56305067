#!/usr/bin/env bash
# Makes a database cluster in an empty PGDATA, as the official image does, then runs what it is told.
set -euo pipefail

value() { # NAME DEFAULT: $NAME, or the content of the file that $NAME_FILE names
  local file_name="${1}_FILE"
  if [ -n "${!file_name:-}" ]; then cat "${!file_name}"; else echo "${!1:-$2}"; fi
}

if [ "${1:-postgres}" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
  user=$(value POSTGRES_USER postgres)
  password=$(value POSTGRES_PASSWORD "")
  database=$(value POSTGRES_DB "$user")
  [ -n "$password" ] || { echo "POSTGRES_PASSWORD is needed to make a database" >&2; exit 1; }
  # Its words are arguments. Without any, initdb has whoever comes from 127.0.0.1 let in without a password.
  initdb --username="$user" --pwfile=<(printf '%s\n' "$password") $(value POSTGRES_INITDB_ARGS "")
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
  if [ "$database" != postgres ]; then
    psql -v ON_ERROR_STOP=1 --username "$user" --dbname postgres -c "CREATE DATABASE \"$database\""
  fi
  export POSTGRES_USER="$user" POSTGRES_DB="$database"
  for file in /docker-entrypoint-initdb.d/*; do
    [ -e "$file" ] || continue
    case "$file" in
      *.sh) if [ -x "$file" ]; then "$file"; else . "$file"; fi ;;
      *.sql) psql -v ON_ERROR_STOP=1 --username "$user" --dbname "$database" -f "$file" ;;
      *) echo "$file is left out: it is neither SQL nor a script" >&2 ;;
    esac
  done
  pg_ctl -D "$PGDATA" -m fast -w stop
fi
if [ "${1:-postgres}" = postgres ]; then
  set -- "$@" -c "listen_addresses=*"
fi
exec "$@"
