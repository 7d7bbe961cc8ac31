"""A stand-in for the W&B server, enough for wandb 0.31's online mode; loopback only.

Speaks `POST /graphql` (the operations that wandb-core sends), `POST .../file_stream` and
`PUT /storage/...`. Everything received is kept; `fault` injects failures:

    with WandbStub() as server:
        subprocess.run([...], env={**os.environ, **server.env()})
        server.history("run-id")
"""

import base64
import contextlib
import gzip
import http.server
import json
import re
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any

Json = dict[str, Any]
Fault = Callable[[str, str], tuple[str, float] | None]
"""(kind, operation or path) -> None, ("status", code), ("hang", seconds) or ("drop", 0)."""

OPERATION = re.compile(r"^\s*(?:query|mutation)\s+(\w+)", re.M)
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class StubRun:
    """What the server knows of one run."""

    def __init__(self, entity: str, project: str, name: str) -> None:
        self.entity, self.project, self.name = entity, project, name
        self.display = name
        self.upserts: list[Json] = []
        self.streams: dict[str, dict[int, str]] = defaultdict(dict)  # file -> line number -> text
        self.complete = False
        self.exit_code: int | None = None
        self.alerts: list[Json] = []

    def lines(self, file: str) -> list[str]:
        """A streamed file in order."""
        stream = self.streams.get(file, {})
        return [stream[number] for number in sorted(stream)]

    def raw_config(self) -> Json:
        """The last configuration sent, W&B's own part included."""
        configs = [upsert["config"] for upsert in self.upserts if upsert.get("config")]
        return dict(json.loads(configs[-1])) if configs else {}

    def bucket(self) -> Json:
        """The run as GraphQL answers have it."""
        return {
            "id": base64.b64encode(f"Run:v1:{self.name}".encode()).decode(),
            "name": self.name,
            "displayName": self.display,
            "description": None,
            "config": "{}",
            "sweepName": None,
            "historyLineCount": len(self.streams[HISTORY]),
            "project": {
                "id": "UHJvamVjdA==",
                "name": self.project,
                "entity": {"id": "RW50aXR5", "name": self.entity},
            },
        }

    def resume_status(self) -> Json:
        """What a client needs in order to continue the run."""
        history, events = self.lines(HISTORY), self.lines("wandb-events.jsonl")
        return self.bucket() | {
            "summaryMetrics": (self.lines(SUMMARY) or ["{}"])[-1],
            "logLineCount": len(self.streams["output.log"]),
            "eventsLineCount": len(events),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "config": json.dumps(self.raw_config()),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }


class _QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients are killed on purpose here: a reset connection is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            traceback.print_exc()


class WandbStub:
    """The server; a context manager."""

    def __init__(self, entity: str = "tester") -> None:
        self.entity = entity
        self.runs: dict[str, StubRun] = {}
        self.operations: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.files: dict[str, bytes] = {}
        self.artifacts: dict[str, Json] = {}
        self.views: list[Json] = []
        self.fault: Fault | None = None
        self.stopped: set[str] = set()  # runs whose "Stop run" button was pressed
        self.lock = threading.RLock()
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "WandbStub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self) -> dict[str, str]:
        """What points a client here; the key is of the right form and opens nothing."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }

    def history(self, run_id: str) -> list[Json]:
        """Every row of a run, in order."""
        with self.lock:
            return [json.loads(line) for line in self.runs[run_id].lines(HISTORY)]

    def summary(self, run_id: str) -> Json:
        """The run's summary."""
        with self.lock:
            lines = self.runs[run_id].lines(SUMMARY)
            return dict(json.loads(lines[-1])) if lines else {}

    def config(self, run_id: str) -> Json:
        """The run's configuration as its user gave it."""
        with self.lock:
            raw = self.runs[run_id].raw_config()
            return {key: entry["value"] for key, entry in raw.items() if key != "_wandb"}

    def run_of(self, variables: Json) -> StubRun:
        """The run that an operation speaks of, new if need be."""
        name = variables.get("name") or variables.get("runName") or variables.get("run") or "?"
        entity = variables.get("entity") or variables.get("entityName") or self.entity
        project = variables.get("project") or variables.get("projectName") or "uncategorized"
        return self.runs.setdefault(name, StubRun(entity, project, name))

    def answer(self, operation: str, variables: Json) -> Json | None:
        """The data that answers a GraphQL operation; None if this stub does not know it."""
        method = getattr(self, f"_on_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            return None
        return dict(method(variables))

    def stream(self, path: str, body: Json) -> Json:
        """Take a file_stream request: `/files/<entity>/<project>/<run>/file_stream`."""
        _, _, entity, project, name, _ = path.split("/")
        run = self.run_of({"name": name, "entity": entity, "project": project})
        for file, part in (body.get("files") or {}).items():
            for number, line in enumerate(part["content"], part["offset"]):
                run.streams[file][number] = line
        if body.get("complete"):
            run.complete, run.exit_code = True, body.get("exitcode")
        return {"stopped": True} if name in self.stopped else {}

    # One method an operation, named after it: `answer` finds them.

    def _on_Viewer(self, _: Json) -> Json:
        viewer = {"id": "VXNlcg==", "entity": self.entity, "username": self.entity}
        return {"viewer": viewer | {"email": "", "flags": "{}", "teams": {"edges": []}}}

    def _on_ServerFeaturesQuery(self, _: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, _: Json) -> Json:
        return {"entity": None}

    def _on_UpsertBucket(self, variables: Json) -> Json:
        new = variables["name"] not in self.runs
        run = self.run_of(variables)
        run.upserts.append(variables)
        run.display = variables.get("displayName") or run.display
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": new}}

    def _on_RunResumeStatus(self, variables: Json) -> Json:
        run = self.runs.get(variables["name"])
        entity = {"id": "e", "name": self.entity}
        bucket = run.resume_status() if run else None
        project = {"id": "m", "name": variables["project"], "entity": entity}
        return {"model": project | {"bucket": bucket}}

    def _on_RewindRun(self, variables: Json) -> Json:
        run = self.run_of(variables)
        run.streams[HISTORY] = {
            number: line
            for number, line in run.streams[HISTORY].items()
            if json.loads(line)["_step"] <= variables["metricValue"]
        }
        return {"rewindRun": {"rewoundRun": run.bucket()}}

    def _on_CreateRunFiles(self, variables: Json) -> Json:
        run = self.run_of(variables)
        base = f"{self.url}/storage/{run.name}"
        files = [{"name": file, "uploadUrl": f"{base}/{file}"} for file in variables["files"]]
        return {"createRunFiles": {"runID": run.name, "uploadHeaders": [], "files": files}}

    def _on_MarkRunFilesUploaded(self, _: Json) -> Json:
        return {"markRunFilesUploaded": {"success": True}}

    def _on_RunStoppedStatus(self, variables: Json) -> Json:
        return {"project": {"run": {"stopped": variables.get("runId") in self.stopped}}}

    def _on_NotifyScriptableRunAlert(self, variables: Json) -> Json:
        self.run_of(variables).alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _on_UpsertView2(self, variables: Json) -> Json:
        self.views.append(variables)
        view = {"id": "v", "name": "n", "displayName": "d", "spec": variables["spec"]}
        return {"upsertView": {"view": view, "inserted": True}}

    def _on_ArtifactType(self, _: Json) -> Json:
        return {"project": None}

    def _on_CreateArtifact(self, variables: Json) -> Json:
        name = f"artifact{len(self.artifacts)}"
        self.artifacts[name] = {**variables["input"], "state": "PENDING"}
        made = {"id": name, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def _manifest(self, operation: str, name: str) -> Json:
        file = {"id": "f", "uploadUrl": f"{self.url}/storage/manifest/{name}", "uploadHeaders": []}
        return {operation: {"artifactManifest": {"id": name, "file": file}}}

    def _on_CreateArtifactManifest(self, variables: Json) -> Json:
        return self._manifest("createArtifactManifest", variables["artifactID"])

    def _on_UpdateArtifactManifest(self, variables: Json) -> Json:
        return self._manifest("updateArtifactManifest", variables["artifactManifestID"])

    def _on_CreateArtifactFiles(self, variables: Json) -> Json:
        edges = []
        for spec in variables.get("input", variables)["artifactFiles"]:
            path = f"artifact/{spec['artifactID']}/{spec['name']}"
            node = {"storagePath": path, "uploadUrl": f"{self.url}/storage/{path}"}
            node |= {"uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": node | {"artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, variables: Json) -> Json:
        artifact = self.artifacts[variables["artifactID"]]
        artifact["state"] = "COMMITTED"
        done = {"id": variables["artifactID"], "digest": artifact.get("digest", "")}
        return {"commitArtifact": {"artifact": done}}


def _handler(stub: WandbStub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing on stderr."""

        def _body(self) -> bytes:
            if "chunked" not in (self.headers.get("transfer-encoding") or ""):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
            else:
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            zipped = self.headers.get("content-encoding") == "gzip"
            return gzip.decompress(body) if zipped else body

        def _reply(self, code: int, answer: Json) -> None:
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _any(self) -> None:
            with contextlib.suppress(ConnectionError):  # a client that was killed
                self._serve(self._body())

        def _serve(self, body: bytes) -> None:
            kind, what = "http", self.path
            variables: Json = {}
            if self.path == "/graphql":
                request = json.loads(body)
                match = OPERATION.search(request["query"])
                kind, what = "graphql", match.group(1) if match else "?"
                variables = request.get("variables") or {}
            elif self.path.endswith("/file_stream"):
                kind = "stream"
            with stub.lock:
                stub.operations[what if kind == "graphql" else kind] += 1
            fault = stub.fault(kind, what) if stub.fault else None
            if fault and fault[0] == "status":
                return self._reply(int(fault[1]), {})
            if fault:
                time.sleep(fault[1])
                self.close_connection = True
                return self.connection.close()
            with stub.lock:
                if kind == "graphql":
                    data = stub.answer(what, variables)
                    problem = {"errors": [{"message": f"unknown operation {what}"}]}
                    return self._reply(*((400, problem) if data is None else (200, {"data": data})))
                if kind == "stream":
                    return self._reply(200, stub.stream(self.path, json.loads(body)))
                if self.path.startswith("/storage/"):
                    stub.files[self.path.split("?")[0]] = body
                    return self._reply(200, {})
            return self._reply(404, {})

        do_GET = do_POST = do_PUT = _any

    return Handler
