"""The config of one use: strict models for `configs/*.yaml`. An unknown key is an error that names the nearest one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import ConfigError, nearest
from pipelines.models.base import Formatting

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class MetadataConfig(Strict):
    """A fact that every passage carries beside its text, to be filtered by and shown; a bare name is a string."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,99}$")
    type: Literal["string", "int", "float", "bool", "strings"] = "string"
    """A value that does not fit sends its row to quarantine; an empty cell or an absent key is no value."""
    column: str | None = Field(default=None, min_length=1)
    """Its column or key in the sources, where that is not its name; `a.b` looks into nested JSON objects."""

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, content: Any) -> Any:
        return {"name": content} if isinstance(content, str) else content

    @model_validator(mode="after")
    def _not_reserved(self) -> MetadataConfig:
        if self.name == "any":
            raise ValueError("`any` is a word of the filter language: give the field another name, and `column: any`")
        return self


class CorpusConfig(Strict):
    """Where passages come from and when a row is refused."""

    name: Name = "corpus"
    sources: list[str] = Field(min_length=1)
    """Paths, globs or URLs (local, s3://, https://); with `format: pydocs`, names of installed packages."""
    format: Literal["auto", "tsv", "csv", "jsonl", "parquet", "pydocs", "images"] = "auto"
    columns: dict[Literal["id", "title", "text", "answers"], str] = {}
    metadata: list[MetadataConfig] = []
    """Further columns or keys, carried along with every passage: `[lang, {name: year, type: int}]`."""
    part_size: int = Field(default=16_384, ge=1)
    """Passages in a part, the unit of work and of resume; images: at most 1,024."""
    split_bytes: int = Field(default=64 << 20, ge=1)
    """Bytes of one parallel read of a big text file."""
    max_row_bytes: int = Field(default=1 << 20, ge=64)
    """A longer row goes to quarantine (often it is an unclosed quote); photographs need more."""
    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    """The run fails when a larger share of the rows is quarantined, at ingest or because they cannot be encoded."""

    @model_validator(mode="after")
    def _metadata_once(self) -> CorpusConfig:
        names = [field.name for field in self.metadata]
        if len(set(names)) < len(names):
            raise ValueError(f"metadata names a field twice: {', '.join(sorted(names))}")
        if names and self.format in ("pydocs", "images"):
            raise ValueError(f"format {self.format} has no columns to take metadata from")
        return self


class EncoderConfig(Strict):
    """The model and everything that changes its vectors, plus how the work is cut (which does not)."""

    checkpoint: str
    """Directory, URL or hub name of the passage encoder (and of the query encoder unless the next is set)."""
    query_checkpoint: str | None = None
    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto is fp16 on a GPU, bf16 on a CPU that multiplies it, else fp32. fp16 is a
    GPU's: a CPU computes passages in fp32 in its place, and queries as auto would."""
    storage: Literal["fp16", "fp32"] = "fp16"
    similarity: Literal["dot", "cosine"] | None = None
    """What the model was trained for, where the checkpoint does not say: sentence-transformers before 3.0."""
    formatting: Formatting | None = None
    """How title and text become one input, where the model was trained on another form than "title. text"."""
    max_length: int | None = Field(default=None, ge=2)
    token_budget: int | None = Field(default=None, ge=1)
    """Tokens in a micro-batch; without it, found by measurement when encoding starts."""


ONLY_AUTO = ("max_memory_gb", "max_ms", "pilot_rows")
"""Keys of the index that choose its factory: once it is chosen they determine nothing of a version."""


class IndexConfig(Strict):
    """What is built: any FAISS factory string that is valid for the encoder's dimension."""

    name: Name = "index"
    factory: str = "Flat"
    """A FAISS factory string, or `auto`: the cheapest that a pilot on a sample finds to keep `min_recall`."""
    refine: Literal["none", "exact"] = "none"
    """exact: keep the vectors beside the codes, on disk as fp16, and let them decide among the candidates that the
    codes find: `k_factor` of them for each hit. With `factory: auto`, none leaves it to the pilot, which tries it where
    the vectors themselves do not fit into `max_memory_gb`."""
    metric: Literal["auto", "ip", "l2"] = "auto"
    """auto: inner product (cosine encoders give unit vectors, so it ranks them by cosine)."""
    num_shards: int | None = Field(default=None, ge=1)
    """Shards asked for; without it, as many as keep `max_shard_rows`."""
    max_shard_rows: int = Field(default=4_000_000, ge=1)
    group_rows: int = Field(default=262_144, ge=1)
    """Rows that one add task puts into its piece of a mergeable index."""
    train_rows: int | None = Field(default=None, ge=1)
    """Size of the training sample; by default what the factory needs."""
    train: Literal["auto", "local", "distributed"] = "auto"
    """Where the lists' centroids are found: by one process, or by all workers on shares of the sample; auto spreads a
    sample of more than a million rows or a gigabyte."""
    seed: int = 0
    search_params: dict[str, int | float] = {}
    """FAISS search parameters of the version, such as nprobe or efSearch; empty, they are tuned to `min_recall`."""
    min_recall: float | None = Field(default=None, ge=0, le=1)
    """Refuse to publish below this recall@10 against exact search; without search_params, also tune to it."""
    max_memory_gb: float | None = Field(default=None, gt=0)
    """With `factory: auto`, the gigabytes (10^9 bytes) that a replica may hold in memory for the index."""
    max_ms: float | None = Field(default=None, gt=0)
    """With `factory: auto`, the milliseconds within which 95 of 100 searches of the index end on one core."""
    pilot_rows: int = Field(default=50_000, ge=1)
    """Passages in the sample that a pilot tries indexes on."""
    recall_queries: int = Field(default=1000, ge=1)
    """Held-out queries; where parameters are tuned, half are tuned on, and the others tell the recall (at 0.95 give or
    take about 0.01 with 500)."""

    @model_validator(mode="after")
    def _auto_has_a_target(self) -> IndexConfig:
        if self.factory == "auto" and (self.min_recall is None or self.search_params):
            raise ValueError("factory: auto needs min_recall, and finds search_params itself")
        if self.factory != "auto" and (self.max_memory_gb or self.max_ms):
            raise ValueError("max_memory_gb and max_ms are limits of factory: auto")
        return self


class EvaluateConfig(Strict):
    questions: str | None = None
    k: list[int] = Field(default=[1, 5, 20, 100], min_length=1)
    positive_prefix: bool = False
    """Count passages `name#2`, `name#3` … as the gold passage `name` (a document cut into passages)."""


class RerankConfig(Strict):
    """The model that reorders hits, in `evaluate` and on request in `serve`."""

    checkpoint: str
    """Directory, URL or hub name of a cross-encoder or a PAQ reranker."""
    depth: int = Field(default=50, ge=1)
    """How many of the hits are scored; those behind keep their order."""
    tokeniser: str | None = None
    """Directory of the tokeniser, for a checkpoint released without one (BERT_Cat)."""
    compute: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"


class AnswerConfig(Strict):
    """What answers from the hits, in `evaluate` and on request in `serve`."""

    reader: str
    """`stored` (the answers of QA pairs), or directory, URL or hub name of a DPR reader or a FiD reader."""
    depth: int = Field(default=20, ge=1)
    """How many of the hits are read."""
    tokeniser: str | None = None
    """Directory of the T5 tokeniser, which FiD checkpoints do not carry."""
    compute: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"


class QuestionsConfig(Strict):
    """The models of PAQ's question generation, for the verbs rank, extract, generate and filter."""

    ranker: str | None = None
    """Directory, URL or hub name of the passage ranker, a TSV of id and score, or `dummy`."""
    extractor: str | None = None
    """PAQ's answer extractor, or a spaCy pipeline or package."""
    generator: str | None = None
    per_span: int = Field(default=1, ge=1, le=4)
    """Questions for each span."""
    reader: str | None = None
    """Answers the questions for the filter; without one every pair counts as consistent."""
    tokeniser: str | None = None
    """Directory of the reader's T5 tokeniser."""


Count = Annotated[int, Field(ge=1)]


def _check_order(value: int | tuple[int, int]) -> int | tuple[int, int]:
    if not isinstance(value, int) and value[0] > value[1]:
        raise ValueError("[min, max] with min <= max")
    return value


Replicas = Annotated[Count | tuple[Count, Count], AfterValidator(_check_order)]


class PromoteConfig(Strict):
    """What a version must keep to be promoted."""

    max_quality_loss: float = Field(default=0.01, ge=0, le=1)
    """The most that a score may lie below the current version's, on the same questions."""
    smoke_queries: int = Field(default=8, ge=1)
    """Queries, taken from the version's own passages, that it must answer."""


class ServeConfig(Strict):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    proxy: Literal["python", "haproxy"] = "python"
    """haproxy: several times the requests a second, without TLS; its metrics (9101) and statistics (8404) are open on
    every interface of the machine."""
    replicas: Replicas = 1
    """Of the gateway: a number, or [min, max] to follow the load."""
    shard_replicas: Replicas = 1
    """Of every shard deployment, with placement "spread"."""
    stage_replicas: Replicas = 1
    """Of the reranker and of the reader."""
    placement: Literal["together", "spread"] = "together"
    """together: every replica maps all shards; spread: shards are deployments of their own."""
    gpus_per_shard: float = Field(default=0, ge=0)
    """With a GPU, or a share of one, a shard deployment keeps its vectors there and searches them all: exactly. It
    takes placement "spread", and versions that keep their vectors: index.factory Flat or SQfp16, or index.refine exact.
    Requests with a filter are searched on CPUs, by the index."""
    threads: int | None = Field(default=None, ge=1)
    """Threads that a gateway's replica encodes and searches with; by default its share of all cores but one."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Query tokens that are encoded together at most, so that long queries do not hold up short ones."""
    shard_timeout_ms: int = Field(default=5_000, ge=1)
    """A shard deployment that takes longer is left out, and the answer names its shards."""
    max_ongoing: int = Field(default=256, ge=1)
    """Requests that a replica works on at a time; more are refused (503)."""
    hold_ms: int = Field(default=1_000, ge=0, le=10_000)
    """The most that a refusal for want of room, or beyond the rate, is held back before it is sent: callers who come
    straight back then cost little. 0 sends it at once."""
    max_queued: int = Field(default=512, ge=1)
    """Requests that wait for a shard, the reranker or the reader before more are refused."""
    aliases: list[Name] = []
    """Other indexes of the root that are served beside `index.name`."""
    versions: list[Name] = []
    """Versions of `index.name` that stay loaded, for requests that name one."""
    follow_seconds: float = Field(default=2.0, gt=0)
    """How often a replica looks whether an alias was moved."""
    max_k: int = Field(default=1000, ge=1)
    max_batch: int = Field(default=256, ge=1)
    max_hits: int = Field(default=30_000, ge=1)
    """Hits in one answer, queries times k: 30,000 passages of a hundred words are some 20 MB. POST /search/batch
    searches no more queries at a time than keep to it."""
    max_query_chars: int = Field(default=10_000, ge=1)
    max_stream: int = Field(default=10_000, ge=1)
    """Queries in one POST /search/batch. Ray Serve's Python proxy takes lines faster than a slow reader does, and keeps
    them in memory; HAProxy does not."""
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    require_key: bool = False
    """Answer only callers with an API key of the scope `search`; needed wherever others can reach the port."""
    keys: str | None = None
    """The file of the API keys (a path or URL); without it `<root>/keys.json`. `pinakes keys` writes it."""
    admin_routes: bool = False
    """Also serve POST /admin/promote and /admin/rollback, to keys of the scope `admin` only."""
    rate_per_second: float | None = Field(default=None, gt=0)
    """Queries that each key (without keys: each address) may ask a second, counted by every replica for itself."""
    rate_burst: int = Field(default=60, ge=1)
    """Queries that may come at once before the rate counts."""
    access_log: bool = True
    """Write a line of JSON for every request to stderr (of the replica); never keys, and no queries unless asked."""
    log_queries: bool = False
    """Put the queries into the log; they may be personal."""
    cpus_per_stage: float = Field(default=0.2, gt=0)
    """Of a reranker's or reader's replica; from 1 on it computes with as many threads."""
    gpus_per_stage: float = Field(default=0, ge=0)
    """With a GPU, or a share of one, the reranker and the reader compute there."""
    budget_ms: int = Field(default=30_000, ge=1)
    """Time that a request may spend; a stage that no longer fits is left out and named in the answer."""

    @model_validator(mode="after")
    def _one_query_fits(self) -> ServeConfig:
        if self.max_k > self.max_hits:
            raise ValueError(f"max_k is {self.max_k}, more than max_hits ({self.max_hits}): raise max_hits, too")
        return self

    @model_validator(mode="after")
    def _gpus_where_shards_are(self) -> ServeConfig:
        if self.gpus_per_shard and self.placement != "spread":
            raise ValueError("gpus_per_shard needs placement: spread, where shards are deployments of their own")
        return self

    @model_validator(mode="after")
    def _rates_of_somebody(self) -> ServeConfig:
        if self.rate_per_second and self.proxy == "haproxy" and not self.require_key:
            raise ValueError("rate_per_second behind haproxy needs require_key: there all callers have one address")
        return self


class ClusterConfig(Strict):
    address: str | None = None
    """An existing cluster (`auto`, host:port, ray://…); without it RAY_ADDRESS, else a cluster on this machine."""
    workers: int | tuple[int, int] | None = None
    """Encoder actors: a number, or [min, max]; without it as many as fit, and more when nodes join."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs of an encoder: 0 encodes on CPUs, 0.5 puts two encoders on each GPU (which share its memory)."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """Cores of an encoder; without it one core, or on a GPU none that others would have to leave free."""

    @model_validator(mode="after")
    def _ordered(self) -> ClusterConfig:
        low, high = self.worker_range() or (1, 1)
        if not 1 <= low <= high:
            raise ValueError("workers is a number >= 1, or [min, max] with 1 <= min <= max")
        return self

    def worker_range(self) -> tuple[int, int] | None:
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers


class Config(Strict):
    """One use of Pinakes: a corpus, an encoder, an index, and how they are evaluated, served and run."""

    root: str = "pinakes-data"
    corpus: CorpusConfig
    encoder: EncoderConfig
    index: IndexConfig = IndexConfig()
    rerank: RerankConfig | None = None
    answer: AnswerConfig | None = None
    questions: QuestionsConfig = QuestionsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    promote: PromoteConfig = PromoteConfig()
    cluster: ClusterConfig = ClusterConfig()


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Read `path` (YAML, local or any fsspec URL) and apply overrides such as `index.factory=Flat`.

    Raises ConfigError naming the file, the key and, for a misspelt key, the nearest one.
    """
    import fsspec
    import yaml

    try:
        with fsspec.open(path, "r", encoding="utf-8") as handle:
            content = yaml.safe_load(handle)
    except FileNotFoundError as error:
        hint = "give the path of a YAML file; `configs/` holds one for each use"
        raise ConfigError("there is no such config file", where=path, hint=hint) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file is not YAML: {error}", where=path) from error
    except OSError as error:
        raise ConfigError(f"the config can't be read: {error}", where=path) from error
    if not isinstance(content, dict):
        raise ConfigError("the file holds no keys", where=path, expected="root, corpus, encoder, index, …")
    for override in overrides or []:
        _override(content, override)
    return parse_config(content, path)


def parse_config(content: dict[str, Any], where: str = "config") -> Config:
    """Validate `content`. Raises ConfigError with every problem found, one a line."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        problems = [_problem(dict(item)) for item in error.errors()]
        plural = "problem" if len(problems) == 1 else "problems"
        raise ConfigError(
            f"{len(problems)} {plural} in the config\n" + "\n".join(f"  - {p}" for p in problems),
            where=where,
            hint="`configs/` holds working examples; README lists the keys",
        ) from error


def _problem(item: dict[str, Any]) -> str:
    location = [str(piece) for piece in item["loc"]]
    key = ".".join(location)
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg']} (found {item.get('input')!r})"
    known = _keys_at(location[:-1])
    guess = nearest(location[-1], known)
    return f"unknown key {key!r}" + (f"; did you mean {guess!r}?" if guess else f"; known keys: {', '.join(known)}")


def _keys_at(location: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for piece in location:
        if piece.isdigit():  # a place in a list
            continue
        annotation = model.model_fields[piece].annotation if piece in model.model_fields else None
        kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
        inner = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return sorted(model.model_fields)


def _override(content: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"cannot read the override {override!r}", expected="key.subkey=value, for example index.factory=Flat"
        )
    *path, last = key.split(".")
    node = content
    for piece in path:
        node = node.setdefault(piece, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{piece!r} in the override {override!r} is a value, not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of the override {override!r} is not YAML: {error}") from error
