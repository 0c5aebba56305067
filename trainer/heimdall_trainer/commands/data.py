"""`heimdall-train data`: make recordings, and tell which there are."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any


def add(commands: Any) -> None:
    """Add the commands to a parser."""
    data = commands.add_parser("data", help="recordings").add_subparsers(dest="what", required=True, metavar="WHAT")
    generate = data.add_parser("generate", help="make recordings and write them to database and store")
    generate.add_argument("--sessions", type=int, default=12)
    generate.add_argument("--transmissions", type=int, default=20, help="transmissions of each session")
    generate.add_argument("--receivers", type=int, default=5)
    generate.add_argument("--samples", type=int, default=4096, help="samples of each recording")
    generate.add_argument("--seed", type=int, default=7)
    generate.set_defaults(call=_generate)
    inspect = data.add_parser("inspect", help="tell what sessions there are")
    inspect.set_defaults(call=_inspect)


def _generate(arguments: argparse.Namespace) -> None:
    from heimdall_trainer.data.generator import generate
    from heimdall_trainer.settings import load_data_settings

    added = generate(
        load_data_settings(),
        sessions=arguments.sessions,
        transmissions_per_session=arguments.transmissions,
        receivers=arguments.receivers,
        samples=arguments.samples,
        seed=arguments.seed,
    )
    print(f"{added} sessions added, {arguments.sessions - added} were there")


def _inspect(arguments: argparse.Namespace) -> None:
    from heimdall_trainer.data.sessions import SessionStore
    from heimdall_trainer.settings import load_data_settings

    del arguments
    with closing(SessionStore.open(load_data_settings())) as store:
        found = store.transmissions(store.approved())
    for session in sorted({item.session_id for item in found}):
        sent = [item for item in found if item.session_id == session]
        print(f"{session}: {len(sent)} transmissions, {sum(len(item.recordings) for item in sent)} recordings")
