"""The Ray Serve application: gateways that answer over HTTP, and behind them shards, reranker and reader.

placement "together" maps all shards in every gateway and searches them on threads: no extra hop. "spread" has as many
shard deployments as the aliases' versions have shards, asked in parallel; both merge with the same function.

`serve.proxy` "haproxy" puts HAProxy, a C program that Ray brings along, before the gateways, which then speak HTTP
themselves; several times as many requests a second go through it. Its limits: messages between deployments of at most 4
MiB (a batch of hits times their number, with "spread" or a reranker), no TLS, and two ports more, of which a machine
has one each, open on every interface whatever `serve.host` says: metrics (9101, RAY_SERVE_HAPROXY_METRICS_PORT) and
statistics (8404, RAY_SERVE_HAPROXY_STATS_PORT). The setting is of the Ray cluster, made before it starts. Searches that
a gateway was working on when it was killed are asked again of another one, by HAProxy or by the door before the Python
proxy.

More requests than `serve.max_ongoing` are refused by us, not by Ray Serve: at a door before its own servers
(`cluster.door`) on clusters that `pinakes` starts, by the API itself elsewhere. A cluster of your own gets the door by
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=cluster.door:middlewares and PINAKES_DOOR='{"max_ongoing": 256}' (the requests
that a proxy lets in; also hold_ms, max_body_bytes and access_log as in `serve`) in the environment of every node.
"""

from __future__ import annotations

import logging
import os
import urllib.request
from typing import Any

from cluster import switch
from cluster.serve_gateway import Gateway
from cluster.serve_stages import Reader, Reranker, Shard
from cluster.session import HAPROXY
from pipelines import publish
from pipelines.config import AnswerConfig, Config, RerankConfig, ServeConfig
from pipelines.errors import ConfigError, PinakesError, from_traceback

_SHARD_CPUS = 0.2
_GATEWAY_CPUS = 0.5
_HEALTH_SECONDS = 30.0
# Requests that a gateway takes on beyond its own limit, to refuse them itself, in the API's words and when it is time;
# Ray Serve would do it in plain text. HAProxy lets no more connections in than this.
_REFUSALS = 4096
_BUSY_REQUESTS = 16  # under way at a replica, on average, beyond which another one is started


def application(aliases: list[str], config: Config) -> Any:
    """Return the Serve application for these aliases. Raises ArtifactError for one that does not exist."""
    root, settings = config.root, config.serve
    manifests = [publish.read_version(root, alias) for alias in aliases]
    pinned = settings.versions
    shards: list[Any] = []
    if settings.placement == "spread":
        number = max(manifest["num_shards"] for manifest in manifests)
        device = "cuda" if settings.gpus_per_shard else "cpu"
        takes = {"num_cpus": _SHARD_CPUS, "num_gpus": settings.gpus_per_shard}
        shards = [
            _deployment(Shard, settings, settings.shard_replicas, name=f"shard-{n}", **takes).bind(
                root, aliases, pinned, n, number, device, settings.follow_seconds
            )
            for n in range(number)
        ]
    reranker = _stage(Reranker, config.rerank, settings) if config.rerank else None
    reader = _stage(Reader, config.answer, settings) if config.answer else None
    gateway = _deployment(Gateway, settings, settings.replicas, num_cpus=_GATEWAY_CPUS).options(
        max_ongoing_requests=settings.max_ongoing + _REFUSALS, max_queued_requests=_REFUSALS
    )
    return gateway.bind(root, aliases, config.model_dump(), _num_threads(settings), shards, reranker, reader)


def _num_threads(settings: ServeConfig) -> int:
    """Return the threads of a gateway's replica: the largest node's cores but one, shared by all replicas.

    Serve's proxies and the event loop need the one: products wait for their slowest thread, and lone queries took twice
    as long where all cores were theirs.
    """
    from cluster.pools import largest_node_cpus

    most = settings.replicas if isinstance(settings.replicas, int) else settings.replicas[1]
    return settings.threads or max(1, (largest_node_cpus() - 1) // most)


def _deployment(kind: Any, settings: ServeConfig, replicas: int | tuple[int, int], **options: Any) -> Any:
    """Return a deployment with its replicas, or its bounds of autoscaling, and its queues' bounds."""
    name = {"name": options.pop("name")} if "name" in options else {}
    scale: dict[str, Any] = {"num_replicas": replicas}
    if not isinstance(replicas, int):
        low, high = replicas
        bounds = {"min_replicas": low, "initial_replicas": low, "max_replicas": high}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": _BUSY_REQUESTS}}
    return kind.options(
        **name,
        **scale,
        ray_actor_options=options,
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
    )


def _stage(kind: Any, stage: RerankConfig | AnswerConfig, settings: ServeConfig) -> Any:
    resources = {"num_cpus": settings.cpus_per_stage, "num_gpus": settings.gpus_per_stage}
    deployment = _deployment(kind, settings, settings.stage_replicas, **resources)
    return deployment.bind(stage.model_dump(), "cuda" if settings.gpus_per_stage else "cpu")


def start(aliases: list[str], config: Config) -> str:
    """Deploy the application on the connected cluster and return its address once it is ready.

    Raises ConfigError when the cluster was started for another `serve.proxy` or nothing answers at the address, and
    what a replica raised, or PinakesError, when the application does not start.
    """
    import ray
    import ray.serve.context
    from ray import serve

    _check_proxy(config.serve)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    host, port = config.serve.host, config.serve.port
    stood = False
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
        stood = switch.APPLICATION in serve.status().applications
        serve.run(
            application(aliases, config),
            name=switch.APPLICATION,
            route_prefix="/",
            logging_config={"log_level": "WARNING"},
        )
    except (RuntimeError, ray.exceptions.RayError) as error:
        status = serve.status()
        if switch.APPLICATION in status.applications and not stood:
            serve.delete(switch.APPLICATION)  # Serve would try again for ever
        raise _failure(status, error) from error
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    _check_answers(address)
    switch.announce(config.root, ray.get_runtime_context().gcs_address)
    return address


def _failure(status: Any, error: Exception) -> PinakesError:
    """Return the error that kept a deployment from starting, as its replica raised it where it is one of ours.

    status: Serve's, whose messages end with the replica's traceback; error: Serve's own.
    """
    found = status.applications.get(switch.APPLICATION)
    for name, deployment in found.deployments.items() if found else ():
        if deployment.status != "DEPLOY_FAILED":
            continue
        what = f"the application did not start: {name}"
        if ours := from_traceback(deployment.message):
            return type(ours)(f"{what}: {ours.what}", where=ours.where, expected=ours.expected, hint=ours.hint)
        last = deployment.message.strip().rpartition("\n")[2]
        return PinakesError(f"{what}: {last}", hint="the deployment's log holds the whole traceback")
    hint = "the deployment's log holds the cause; `pinakes status` checks the versions"
    return PinakesError(f"the application did not start: {error}", hint=hint)


def _check_proxy(settings: ServeConfig) -> None:
    """Raise ConfigError when the cluster's workers were started for another proxy than the config's."""
    import ray

    found = ray.get(ray.remote(_environment).options(num_cpus=0).remote())
    wanted = HAPROXY if settings.proxy == "haproxy" else {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    if any(found[name] != value for name, value in wanted.items()):
        told = " ".join(f"{name}={value}" for name, value in wanted.items())
        hint = f"set {told} on every node before `ray start`, or change serve.proxy"
        raise ConfigError(f"the Ray cluster was not started for serve.proxy {settings.proxy!r}", hint=hint)


def _environment() -> dict[str, str]:
    return {name: os.environ.get(name, "0") for name in HAPROXY}


def _check_answers(address: str) -> None:
    """Raise ConfigError when nothing of ours answers at `address`."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=_HEALTH_SECONDS):
            return
    except OSError as error:
        hint = "Ray Serve keeps the port it was first started with: use that one (serve.port), or shut Serve down first"
        raise ConfigError(f"the application is up but does not answer: {error}", where=address, hint=hint) from error


def stop(root: str) -> None:
    """Take the application down again."""
    from ray import serve

    switch.withdraw(root)
    serve.delete(switch.APPLICATION)
