"""sentence-transformers' side of the encode benchmark, each run in a fresh process: `PYTHON encode_peers.py JOB.json`.

Imports nothing of this project, so that it runs in any interpreter with sentence-transformers: the ONNX and OpenVINO
backends need one of their own. A setting is a dict: backend, dtype, batch_size, pool (worker processes), compile, file
(of the weights), options (of OpenVINO); what it leaves out is sentence-transformers' default.

Tasks: run (one setting on all texts), pilot (many settings on the first few texts), export (ONNX and OpenVINO files).
Loading and warming up are not part of a rate.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_WARM = 64  # texts encoded before the clock starts
_CHUNKS_A_WORKER = 8  # of a pool: enough that no worker waits long at the end


class Peer:
    """A loaded sentence-transformers model under one setting."""

    def __init__(self, checkpoint: str, setting: dict[str, Any], kind: str) -> None:
        from sentence_transformers import CrossEncoder, SentenceTransformer

        self.kind, self.workers = kind, setting.get("pool", 0)
        options: dict[str, Any] = {}
        if setting.get("dtype"):
            options["dtype"] = setting["dtype"]
        if setting.get("file"):
            options["file_name"] = setting["file"]
        if setting.get("options"):
            options["ov_config"] = setting["options"]
        arguments: dict[str, Any] = {"device": "cpu"}
        if options:
            arguments["model_kwargs"] = options
        if setting.get("backend"):
            arguments["backend"] = setting["backend"]
        self.model = (CrossEncoder if kind == "cross" else SentenceTransformer)(checkpoint, **arguments)
        if setting.get("compile"):
            self._compile()
        self.pool = self.model.start_multi_process_pool(["cpu"] * self.workers) if self.workers else None

    def _compile(self) -> None:
        part = self.model.model if self.kind == "cross" else self.model[0].auto_model
        part.compile(dynamic=True)

    def run(self, texts: list[Any], batch_size: int | None) -> Any:
        """Return the vectors (N, D), or a cross-encoder's raw logits (N,), of texts or pairs."""
        import torch

        arguments: dict[str, Any] = {"show_progress_bar": False}
        if batch_size:
            arguments["batch_size"] = batch_size
        if self.pool:
            chunk = -(-len(texts) // (self.workers * _CHUNKS_A_WORKER))
            arguments |= {"pool": self.pool, "chunk_size": max(batch_size or 1, chunk)}
        if self.kind == "cross":
            return self.model.predict(texts, activation_fn=torch.nn.Identity(), **arguments)
        return self.model.encode(texts, **arguments)

    def lengths(self, texts: list[Any]) -> list[int]:
        """Return the tokens of each text, or pair, as this model cuts them."""
        length = self.model.max_length if self.kind == "cross" else self.model.max_seq_length
        columns = [list(side) for side in zip(*texts, strict=True)] if self.kind == "cross" else [texts]
        tokens = self.model.tokenizer(*columns, truncation=True, max_length=length)
        return [len(ids) for ids in tokens["input_ids"]]

    def close(self) -> None:
        if self.pool:
            self.model.stop_multi_process_pool(self.pool)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Encode all texts; keep vectors and lengths where the job names files for them."""
    import sentence_transformers
    import torch

    setting, texts = job["setting"], json.loads(Path(job["texts"]).read_text())
    if setting.get("pool"):
        assert torch.get_num_threads() == 1, "the workers of a pool are to have one thread each"
    peer = Peer(job["checkpoint"], setting, job["kind"])
    peer.run(_warm_up(texts, setting), setting.get("batch_size"))
    ready = time.time()
    found = peer.run(texts, setting.get("batch_size"))
    seconds = time.time() - ready
    if job.get("vectors"):
        np.save(job["vectors"], np.asarray(found, np.float32))
    lengths = peer.lengths(texts)
    if job.get("lengths"):
        np.save(job["lengths"], np.array(lengths))
    peer.close()
    return {
        "rate": len(texts) / seconds,
        "startup": ready - job["started"],
        "seconds": seconds,
        "num_rows": len(texts),
        "num_tokens": sum(lengths),
        "threads": torch.get_num_threads(),
        "setting": setting,
        "packages": {"sentence-transformers": sentence_transformers.__version__, "torch": torch.__version__},
    }


def _warm_up(texts: list[Any], setting: dict[str, Any]) -> list[Any]:
    """Return texts of short and long kinds: torch.compile makes code for lengths that it has not seen."""
    return texts[: 4 * _WARM] if setting.get("compile") else texts[:_WARM]


def pilot(job: dict[str, Any]) -> dict[str, Any]:
    """Measure every setting on the first texts; one that does not work is recorded with its error."""
    texts = json.loads(Path(job["texts"]).read_text())[: job["num_texts"]]
    results = []
    peer, loaded = None, None
    for setting in job["settings"]:
        batch_size = setting.get("batch_size")
        wanted = {key: value for key, value in setting.items() if key != "batch_size"}
        try:
            if peer is None or wanted != loaded:
                if peer is not None:
                    peer.close()
                peer, loaded = Peer(job["checkpoint"], setting, job["kind"]), wanted
                peer.run(_warm_up(texts, setting), batch_size)
            started = time.time()
            peer.run(texts, batch_size)
            results.append({"setting": setting, "rate": len(texts) / (time.time() - started)})
        except Exception as error:  # a backend may refuse an option in any way it likes: that is a result, and printed
            results.append({"setting": setting, "rate": 0.0, "error": f"{type(error).__name__}: {error}"[:300]})
            peer = None
    if peer is not None:
        peer.close()
    return {"results": results}


def export(job: dict[str, Any]) -> dict[str, Any]:
    """Write the model for one backend under job["target"]; ONNX at optimisation level O3, too (O4 is for GPUs)."""
    from sentence_transformers import SentenceTransformer, export_optimized_onnx_model

    model = SentenceTransformer(job["checkpoint"], backend=job["backend"], device="cpu")
    model.save_pretrained(job["target"])
    if job["backend"] == "onnx":
        export_optimized_onnx_model(model, "O3", job["target"])
    endings = (".onnx", "_model.xml")
    root = Path(job["target"])
    return {"files": sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.name.endswith(endings))}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {"run": run, "pilot": pilot, "export": export}[job["task"]](job)
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":  # the workers of a pool import this file again
    main()
