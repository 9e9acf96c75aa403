"""A local server that speaks the chat completions protocol, as well or as badly as it is told."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def chat_server(answers):
    """``(base_url, requests)``: every request takes the next of ``answers``: a value (sent as the
    message's JSON), a text (sent as it is), an int (that HTTP status), bytes (sent as the whole
    body), or a function of the request; the last one stays."""
    requests, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers["Authorization"], "body": body})
            answer = left.pop(0) if len(left) > 1 else left[0]
            if callable(answer):
                answer = answer(body)
            status, raw = 200, answer
            if isinstance(answer, int):
                status, raw = answer, b'{"error": {"message": "no"}}'
            elif not isinstance(answer, bytes):
                text = answer if isinstance(answer, str) else json.dumps(answer)
                raw = json.dumps({
                    "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop",
                                 "message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
                }).encode()  # fmt: skip
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
