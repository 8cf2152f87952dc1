"""What each verb of the command does, as a function from a config to a result (a JSON-able dict)."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.progress import Progress
from cluster.session import choose_proxy, result_stream, session
from pipelines import publish
from pipelines.answer import check_reader
from pipelines.client import Client
from pipelines.config import Config
from pipelines.encode import EncoderSpec, check_takes_images, resolve
from pipelines.rerank import check_reranker
from pipelines.retrieve import check_encoder


def ingest(config: Config, progress: Progress) -> dict[str, Any]:
    """Make the snapshot of the config's corpus."""
    with session(config.cluster):
        return _result(_ingest(config, progress), progress)


def encode(config: Config, progress: Progress) -> dict[str, Any]:
    """Make the snapshot if need be, and its embeddings."""
    spec = encoder_of(config)
    with session(config.cluster):
        return _result(_encode(config, spec, _ingest(config, progress), progress), progress)


def index(config: Config, progress: Progress) -> dict[str, Any]:
    """Make whatever is missing up to a published version; set the alias if it is new."""
    spec = encoder_of(config)
    with session(config.cluster):
        manifest = _index(config, spec, progress)
    if config.index.name not in publish.list_aliases(config.root):
        publish.promote(config.root, config.index.name, manifest["version"])
    elif (now := publish.current(config.root, config.index.name)) != manifest["version"]:
        command = f"pinakes promote {config.index.name} {manifest['version']} --root {config.root}"
        progress.say(f"alias {config.index.name} still points to {now}; to switch: {command}")
    return _result(manifest, progress)


def run(config: Config, progress: Progress, force: bool = False) -> dict[str, Any]:
    """Do the whole job, and point the alias to the version it made, if that passes the gate.

    force: as of `switch.promote`. Raises what that raises; the version is then published, and the alias not moved.
    """
    spec = encoder_of(config)
    with session(config.cluster):
        manifest = _index(config, spec, progress)
        evaluation = None
        if config.evaluate.questions:
            from cluster.evaluate import evaluate as evaluate_version

            evaluation = evaluate_version(config.root, manifest, config, progress)
    alias = _promoted(config, str(manifest["version"]), force)
    return _result({"version": manifest, "evaluation": evaluation, "alias": alias}, progress)


def _promoted(config: Config, version: str, force: bool) -> dict[str, Any]:
    """Return the state of the alias once it points to `version`; where it does already, nothing is checked again."""
    from cluster.switch import promote_from_here

    root, name = config.root, config.index.name
    if name in publish.list_aliases(root) and (state := publish.read_alias(root, name))["current"] == version:
        return {"name": name, **state}
    settings = config.promote.model_dump(exclude_unset=True)
    return promote_from_here(root, name, version, settings, force, config.cluster.address)


def evaluate(config: Config, version: str | None, progress: Progress) -> dict[str, Any]:
    """Score the alias's version (or `version`) on the config's questions."""
    from cluster.evaluate import evaluate as evaluate_version

    manifest = publish.read_version(config.root, config.index.name, version)
    check_encoder(manifest, encoder_of(config))
    with session(config.cluster):
        return _result(evaluate_version(config.root, manifest, config, progress), progress)


def serve_until_interrupted(config: Config, progress: Progress) -> None:
    """Serve the config's alias until Ctrl-C or SIGTERM."""
    from cluster.access import exposure

    if warning := exposure(config.serve):
        progress.say(f"warning: {warning}")
    with serving(config) as address:
        progress.say(_how_to_use(address, config))
        _wait_for_signal()


def demo(config: Config, once: bool, progress: Progress) -> None:
    """Run the whole job, print its evaluation, serve it; with `once` ask one question over HTTP and stop."""
    from rich.console import Console

    from cluster.summaries import evaluation_summary, search_summary

    choose_proxy(config.serve)
    with session(config.cluster):
        result = run(config, progress)
        if result["evaluation"]:
            Console(file=result_stream()).print(evaluation_summary(result["evaluation"]))
        if once:
            Console(file=result_stream(), highlight=False).print(search_summary(_ask_once(config)), markup=False)
            return
        with serving(config) as address:
            progress.say(_how_to_use(address, config))
            _wait_for_signal()


def _ask_once(config: Config) -> dict[str, Any]:
    """Serve on a free port, ask one question over HTTP and stop."""
    question = "How do I read a Parquet file into a table?"
    settings = config.serve.model_copy(update={"port": free_port()})
    with (
        _key_for_a_while(config) as key,
        serving(config.model_copy(update={"serve": settings})) as address,
        Client(address, key) as client,
    ):
        return {"query": question, **client.ask("POST", "/search", {"query": question, "k": 3})}


@contextmanager
def _key_for_a_while(config: Config) -> Iterator[str | None]:
    """Give an API key that is good until the end, or None where the config wants none."""
    if not config.serve.require_key:
        yield None
        return
    from pipelines.access_keys import KeyFile, default_url

    file = KeyFile(config.serve.keys or default_url(config.root))
    key, record = file.create("demo --once", days=1 / 24)
    try:
        yield key
    finally:
        file.revoke(record.id)


@contextmanager
def serving(config: Config) -> Iterator[str]:
    """Serve the config's alias, and those of `serve.aliases`, and give the address."""
    aliases = list(dict.fromkeys([config.index.name, *config.serve.aliases]))
    for alias in aliases:
        publish.read_alias(config.root, alias)
    _check_stages(config)
    choose_proxy(config.serve)
    with session(config.cluster):
        from cluster import serve

        address = serve.start(aliases, config)
        try:
            yield address
        finally:
            serve.stop(config.root)


def _how_to_use(address: str, config: Config) -> str:
    body = json.dumps({"query": "how do I read a Parquet file", "k": 3})
    key = "-H 'Authorization: Bearer KEY' " if config.serve.require_key else ""
    return (
        f"\nserving {config.index.name!r}; stop with Ctrl-C\n  search page  {address}/\n  API          {address}/docs\n"
        f"  example      curl -s {address}/search {key}-H 'Content-Type: application/json' -d '{body}'"
    )


def _wait_for_signal() -> None:
    """Return on SIGTERM; Ctrl-C raises KeyboardInterrupt as everywhere."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        while not stopped.wait(0.5):
            pass
    except KeyboardInterrupt:
        print("\nstopping", file=sys.stderr)


def encoder_of(config: Config) -> EncoderSpec:
    """Resolve the encoder, and look at every other model of the config: a wrong one is refused before hours of work."""
    spec = resolve(config.encoder, on_gpu=config.cluster.gpus_per_worker > 0)
    if config.corpus.format == "images":
        check_takes_images(spec)
    if config.evaluate.questions:
        _check_stages(config)
    return spec


def _check_stages(config: Config) -> None:
    """Look at the reranker and the reader of the config, without loading them."""
    if config.rerank:
        check_reranker(config.rerank)
    if config.answer:
        check_reader(config.answer.reader, config.answer.tokeniser)


def _ingest(config: Config, progress: Progress) -> dict[str, Any]:
    from cluster.ingest import ingest as make_snapshot

    return make_snapshot(config.root, config.corpus, progress)


def _encode(config: Config, spec: EncoderSpec, snapshot: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from cluster.encode import encode as embed

    share = config.corpus.max_quarantined_share
    return embed(config.root, snapshot, spec, config.cluster, progress, share)


def _index(config: Config, spec: EncoderSpec, progress: Progress) -> dict[str, Any]:
    check_index(config, spec)
    return embed_and_index(config, spec, _ingest(config, progress), progress)


def check_index(config: Config, spec: EncoderSpec) -> None:
    """Refuse an impossible factory or search parameter, before hours of encoding."""
    from pipelines.index.search import check_params
    from pipelines.index.spec import new_index, parse_spec
    from pipelines.index.tiers import check_refine, split_params

    if config.index.factory == "auto":
        return
    metric = "ip" if config.index.metric == "auto" else config.index.metric
    empty, params = new_index(parse_spec(config.index.factory, spec.dim, metric)), config.index.search_params
    if config.index.refine == "exact":
        check_refine(empty)
        _, params = split_params(params)
    check_params(empty, params)


def embed_and_index(config: Config, spec: EncoderSpec, snapshot: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Make whatever a snapshot lacks to become a published version; return the version's manifest."""
    from cluster.index import build_version
    from cluster.plan import settle

    embedded = _encode(config, spec, snapshot, progress)
    chosen, forecast = settle(config, snapshot, embedded, progress)
    gpus, questions = config.cluster.gpus_per_worker, config.evaluate.questions
    return build_version(config.root, chosen, snapshot, embedded, progress, questions, forecast, gpus)


def _result(content: dict[str, Any], progress: Progress) -> dict[str, Any]:
    return {**content, "stages": progress.stages}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
