"""After a failure the next call opens a new connection."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from heimdall_tracking.connections import forget_connections


class Counting(http.server.BaseHTTPRequestHandler):
    """Answers everything with an empty 404, on connections that it keeps, as a stranger on the way would."""

    protocol_version = "HTTP/1.1"
    connections: set[tuple[str, int]]

    def do_GET(self) -> None:
        self.connections.add(self.client_address)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def stranger() -> Iterator[http.server.ThreadingHTTPServer]:
    Counting.connections = set()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("forget", "expected"), [(False, 1), (True, 3)])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_kept_connection_is_left_when_it_is_forgotten(
    stranger: http.server.ThreadingHTTPServer, forget: bool, expected: int
) -> None:
    forget_connections()
    client = MlflowClient(f"http://127.0.0.1:{stranger.server_address[1]}")

    for _ in range(3):
        with pytest.raises(MlflowException):
            client.get_run("r1")
        if forget:
            forget_connections()

    assert len(Counting.connections) == expected
