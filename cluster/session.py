"""Connect to a Ray cluster, or start one on this machine, and let go of it again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from cluster import signals
from pipelines.config import ClusterConfig, ServeConfig
from pipelines.errors import ConfigError, PinakesError

HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""What the nodes' environment says where `serve.proxy` is "haproxy". Ray reads it when it starts, and when its Serve is
imported."""

HAPROXY_RETRIES = {
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "10",
}
"""Ask another replica when one dies before it has answered, instead of failing: searching twice does no harm. HAProxy
tries a dead one several times before it counts as down, since nobody is waiting there; its usual 3 do not suffice."""

DOOR = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "cluster.door:middlewares")
DOOR_LIMITS = "PINAKES_DOOR"
"""What the door has to know of `serve`, as JSON; max_ongoing here is what one of Serve's proxies lets in."""
_OF_THE_DOOR = {"hold_ms", "max_body_bytes", "access_log"}

_results: TextIO | None = None


def choose_proxy(settings: ServeConfig) -> None:
    """Set what a cluster that this process starts needs for `serve.proxy`; before it starts, and Serve is imported."""
    replicas = settings.replicas if isinstance(settings.replicas, int) else settings.replicas[1]
    os.environ.setdefault(*DOOR)
    limits = settings.model_dump(include=_OF_THE_DOOR)
    os.environ[DOOR_LIMITS] = json.dumps({"max_ongoing": settings.max_ongoing * replicas, **limits})
    # Serve's HTTP servers would believe whoever comes from this machine (HAProxy passes on what callers say) about
    # their address, which rates go by.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    if settings.proxy == "haproxy":
        os.environ.update(HAPROXY)
        for name, value in HAPROXY_RETRIES.items():
            os.environ.setdefault(name, value)


@contextmanager
def session(config: ClusterConfig) -> Iterator[None]:
    """Hold a connection to the cluster of `config` (or RAY_ADDRESS); without either, a local cluster that ends with us.

    Errors raised by our own code inside a worker come out as themselves, not wrapped in Ray's. An inner session joins
    the outer one.
    """
    import ray

    if ray.is_initialized():
        with our_errors():
            yield
        return
    with _results_kept_apart():
        _connect(config)
        signals.renew()
        try:
            with our_errors():
                yield
        finally:
            ray.shutdown()


def result_stream() -> TextIO:
    """Return the stream that results go to: stdout, also while a session keeps Ray's own messages off it."""
    return _results or sys.stdout


@contextmanager
def our_errors() -> Iterator[None]:
    """Raise what our own code raised in a worker as itself, not wrapped in Ray's errors."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise unwrap(error) from error


@contextmanager
def _results_kept_apart() -> Iterator[None]:
    """Send what Ray prints to stdout (warnings of its daemons, for one) to stderr: stdout belongs to results."""
    global _results
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    _results = os.fdopen(kept, "w", encoding="utf-8", closefd=False)
    try:
        yield
    finally:
        _results.close()
        _results = None
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _connect(config: ClusterConfig) -> None:
    import logging

    import ray

    # Ray's native layer prints errors that are advice to Ray's own developers (ray-project/ray#53727, for one).
    # RAY_BACKEND_LOG_LEVEL=info brings them back.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False, "ignore_reinit_error": True}
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's new default would blank the accelerator variables of CPU workers and warn about it.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            with _without_stderr():
                ray.init(address="local", include_dashboard=False, **options)
        except Exception as error:  # of any kind: Ray raises a bare Exception when its processes take too long
            told = str(error).strip().partition("\n")[0]
            hint = "run the command again when the machine is less busy; Ray's logs lie in /tmp/ray/session_latest/logs"
            raise PinakesError(f"Ray did not start on this machine: {told}", hint=hint) from error
    else:
        try:
            with _without_stderr():
                ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            hint = "check cluster.address or RAY_ADDRESS, and RAY_AUTH_MODE/RAY_AUTH_TOKEN if the cluster uses tokens"
            raise ConfigError(f"cannot connect to the Ray cluster: {error}", where=address, hint=hint) from error
    _quiet_data_logs()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what native code prints while Ray connects (it announces its log level); failures are raised anyway."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quiet_data_logs() -> None:
    import logging

    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # a thread a worker that only feeds a statistic we do not show
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def unwrap(error: BaseException) -> BaseException:
    """Return the PinakesError at the root of what Ray raised, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PinakesError) and type(seen).__module__ == "pipelines.errors":
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
