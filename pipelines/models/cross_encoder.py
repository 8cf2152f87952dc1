"""Cross-encoders: Hugging Face sequence-classification directories that score a (query, passage) pair.

One label: the score is the raw logit, whatever activation the checkpoint names, because a sigmoid saturates in fp32
and loses order far out. Two labels (not relevant, relevant): logit 1 minus logit 0, which orders exactly like
softmax[:, 1]. Two released models have a head that transformers does not build, a Linear straight on the first
hidden state: Capreolus' ELECTRA and Hofstätter's BERT_Cat. Anything that would leave a head random is refused.

PAQ's passage ranker is a two-label BERT of this layout over passages alone: `load_passage_ranker`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import CheckpointError
from pipelines.models import tokens
from pipelines.models.base import CrossEncoder, ModelInfo, PassageRanker
from pipelines.models.classifier import TextClassifier
from pipelines.models.engine import Forward
from pipelines.models.files import TOKENISER_FILES, peek_json, read_json, refuse, require_files, tensor_shapes
from pipelines.models.sentence_transformers import position_limit
from pipelines.schema import Passage

_MAX_LENGTH = 512
_RANKER_LENGTH = 256  # tokens; PAQ cuts passages there, whatever the checkpoint says
_HEADS = ("_classification_layer", "classifier.out_proj", "classifier", "score")
_WORDPIECE = ("bert", "electra", "distilbert", "BERT_Cat")  # backbones whose vocab.txt is BERT's WordPiece
# What early fine-tuning scripts left in config.json: the class of the model they had started from.
_STARTING_POINTS = ("ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction", "BertModel")
_HEAD_OF = {"bert": "classifier.weight", "electra": "classifier.out_proj.weight"}
# TinyBERT's projections to its teacher's width: used in distillation only.
_TRAINING_ONLY = re.compile(r"^(bert\.)?fit_denses?\.")


def recognises(directory: str) -> bool:
    """Tell by the class that config.json names; where it is BERT's that training started from, by the tensors."""
    config = peek_json(directory, "config.json")
    if os.path.isfile(os.path.join(directory, "modules.json")):
        return bool(peek_json(directory, "config_sentence_transformers.json").get("model_type") == "CrossEncoder")
    names = architectures(config)
    if config.get("model_type") == "BERT_Cat" or any(name.endswith("ForSequenceClassification") for name in names):
        return True
    started = all(name.endswith(_STARTING_POINTS) for name in names)
    return bool(config) and started and _classifies(directory, config.get("model_type", "bert"))


def architectures(config: dict[str, Any]) -> list[str]:
    """Return the class names in a config.json; [] where it names none."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _classifies(directory: str, model: str) -> bool:
    """Tell whether the weights are this model's with a head of one or two labels: BERT's own, or Capreolus' ELECTRA."""
    if model not in _HEAD_OF:
        return False
    try:
        shapes = tensor_shapes(directory)
    except CheckpointError:
        return False
    head = shapes.get(_HEAD_OF[model], ())
    return f"{model}.embeddings.word_embeddings.weight" in shapes and len(head) == 2 and head[0] in (1, 2)


@dataclass(frozen=True)
class _Layout:
    """backbone: its model_type. head: the name of the last Linear. prefix: of the backbone's tensors where the head is
    that Linear alone, on the first hidden state; "" where transformers builds the head.
    """

    backbone: str
    labels: int
    head: str
    prefix: str = ""
    positions: int | None = None


def _layout(directory: str) -> _Layout:
    """Return what the tensors say. Raises CheckpointError for no head, or one of more than two labels."""
    config = read_json(directory, "config.json", required=True)
    if _has_tokeniser(directory) or config.get("model_type") != "BERT_Cat":
        require_files(directory)
    shapes = tensor_shapes(directory)
    head = next((name for name in _HEADS if f"{name}.weight" in shapes), None)
    if head is None:
        refuse("the weights have no classification head", directory, expected="classifier.weight or the like")
    labels = int(shapes[f"{head}.weight"][0])
    if labels not in (1, 2):
        refuse(f"the head has {labels} labels", directory, expected="1 (a score) or 2 (not relevant, relevant)")
    backbone = str(config.get("model_type", "bert"))
    if backbone == "BERT_Cat":
        _check_bert_cat(directory, head, shapes)
        positions = shapes["bert_model.embeddings.position_embeddings.weight"][0]
        return _Layout("distilbert", labels, head, "bert_model.", positions)
    # An ordinary ELECTRA that lost classifier.dense has the very same tensors: nothing in a file tells them apart.
    if backbone == "electra" and head == "classifier.out_proj" and "classifier.dense.weight" not in shapes:
        return _Layout(backbone, labels, head, "electra.", position_limit(config))
    return _Layout(backbone, labels, head, "", position_limit(config))


def _has_tokeniser(directory: str) -> bool:
    """Tell whether a tokeniser lies there; Hofstaetter's BERT_Cat was released without one."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in TOKENISER_FILES)


def _check_bert_cat(directory: str, head: str, shapes: dict[str, tuple[int, ...]]) -> None:
    wanted = [f"bert_model.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")]
    wanted += ["bert_model.transformer.layer.0.ffn.lin1.weight"]
    missing = [name for name in wanted if name not in shapes]
    if head != "_classification_layer" or missing:
        expected = "a DistilBERT under bert_model.* and a _classification_layer"
        refuse("the weights are no BERT_Cat's", directory, expected=expected)


def info(directory: str) -> ModelInfo:
    """Describe the cross-encoder. Raises CheckpointError for another kind, an unknown head, or lost files."""
    if not recognises(directory):
        names = ", ".join(architectures(read_json(directory, "config.json"))) or "no architecture named"
        refuse(f"this is no cross-encoder ({names})", directory, expected="a ...ForSequenceClassification model")
    _check_modules(directory)
    layout = _layout(directory)
    default = _default_length(directory)
    return ModelInfo(
        family="cross_encoder",
        kind="cross-encoder",
        computes="the raw logit" if layout.labels == 1 else "logit 1 minus logit 0 (orders like softmax[:, 1])",
        max_length=min(default, layout.positions) if layout.positions else default,
        formatting='the pair (query, "title. text"); the text alone when there is no title',
        details={
            "backbone": layout.backbone,
            "labels": layout.labels,
            "head": f"{layout.head} on the first hidden state" if layout.prefix else "the backbone's own",
            "has_tokeniser": _has_tokeniser(directory),
        },
    )


def _check_modules(directory: str) -> None:
    """Refuse a sentence-transformers cross-encoder that is more than a sequence classifier, or needs a prompt."""
    if not os.path.isfile(os.path.join(directory, "modules.json")):
        return
    modules = read_json(directory, "modules.json", kind=list)
    kinds = [str(m.get("type", "")).rsplit(".", 1)[-1] if isinstance(m, dict) else "?" for m in modules]
    if kinds != ["Transformer"] or modules[0].get("path"):
        expected = "one Transformer, at the root of the directory"
        refuse(f"this cross-encoder's modules.json lists {', '.join(kinds) or 'nothing'}", directory, expected=expected)
    if read_json(directory, "config_sentence_transformers.json").get("default_prompt_name"):
        refuse("a cross-encoder with a prompt is not supported", directory, expected="no default_prompt_name")


def _default_length(directory: str) -> int:
    own = read_json(directory, "sentence_bert_config.json").get("max_seq_length")
    if isinstance(own, int):
        return own
    declared = read_json(directory, "tokenizer_config.json").get("model_max_length") or _MAX_LENGTH
    return int(min(declared, _MAX_LENGTH))


def load(
    directory: str,
    dtype: str = "fp32",
    device: str = "cpu",
    *,
    max_length: int | None = None,
    token_budget: int | None = None,
    tokeniser: str | None = None,
) -> CrossEncoder:
    """Load the model and its tokeniser. max_length: tokens of the pair, special tokens included.

    tokeniser: directory of a tokeniser in place of the checkpoint's, for a BERT_Cat, which comes without one. Raises
    CheckpointError when the directory is incomplete or of another kind.
    """
    described = info(directory)
    own = tokeniser or directory
    return PairScorer(_classifier(directory, described.max_length, dtype, device, max_length, token_budget, own))


def load_passage_ranker(
    directory: str, dtype: str = "fp32", device: str = "cpu", *, token_budget: int | None = None
) -> PassageRanker:
    """Load PAQ's passage ranker. Raises CheckpointError when it is incomplete or has not 2 labels."""
    described = info(directory)
    if described.details["labels"] != 2:
        refuse("a passage ranker with one label is not supported", directory, expected="2 labels")
    length = min(described.max_length, _RANKER_LENGTH)
    return PassageScorer(_classifier(directory, length, dtype, device, None, token_budget, directory))


def _classifier(
    directory: str,
    default: int,
    dtype: str,
    device: str,
    max_length: int | None,
    token_budget: int | None,
    tokeniser: str,
) -> TextClassifier:
    layout = _layout(directory)
    length = tokens.checked_length(max_length, default, layout.positions)
    forward, segments = (
        _own_head(directory, layout, dtype, device) if layout.prefix else _standard(directory, layout, dtype, device)
    )
    backend = _backend(tokeniser)
    _check_vocabulary(directory, backend)
    encoder = tokens.TextEncoder(backend, tokens.pad_id(directory, backend), length, with_types=segments > 1)
    return TextClassifier(forward, encoder, layout.labels, device, token_budget)


def _check_vocabulary(directory: str, backend: Any) -> None:
    """Refuse a tokeniser that gives ids which the model has no embedding for."""
    tables = [shape for name, shape in tensor_shapes(directory).items() if name.endswith("word_embeddings.weight")]
    pieces = backend.get_vocab_size()
    if tables and pieces > tables[0][0]:
        what = f"the tokeniser has {pieces:,} pieces, the model {tables[0][0]:,} embeddings"
        refuse(what, directory, expected="the tokeniser that the model was trained with")


def _backend(directory: str) -> Any:
    """Return the tokeniser, also of the old directories whose tokenizer_config.json or config.json names no class."""
    if not _has_tokeniser(directory):
        hint = "set rerank.tokeniser (--tokeniser) to a directory with distilbert-base-uncased's vocab.txt"
        refuse("the checkpoint has no tokeniser", directory, expected=f"one of {', '.join(TOKENISER_FILES)}", hint=hint)
    named = read_json(directory, "tokenizer_config.json").get("tokenizer_class")
    model = read_json(directory, "config.json").get("model_type", "bert")
    return tokens.load_backend(directory, "BertTokenizer" if not named and model in _WORDPIECE else "AutoTokenizer")


def _standard(directory: str, layout: _Layout, dtype: str, device: str) -> tuple[Forward, int]:
    """Return transformers' own sequence classifier as a function, and its number of segments."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as MAPPING
    from transformers import BertConfig

    from pipelines.models.packed import pack
    from pipelines.models.weights import build_model, read_config, read_weights

    raw = read_json(directory, "config.json")
    config = read_config(directory) if "model_type" in raw else BertConfig.from_dict(raw)
    if type(config) not in MAPPING:
        refuse(f"a {config.model_type} cross-encoder is not supported", directory)
    config.num_labels = layout.labels  # the weights decide; an old config.json may say otherwise
    state = {name: tensor for name, tensor in read_weights(directory).items() if not _TRAINING_ONLY.match(name)}
    model = pack(build_model(MAPPING[type(config)], config, state, dtype, directory, needs_pooler=True).to(device))

    def forward(ids_BL: Any, mask_BL: Any, types_BL: Any) -> Any:
        types = {} if types_BL is None else {"token_type_ids": types_BL}
        return model(input_ids=ids_BL, attention_mask=mask_BL, **types).logits.float()

    return forward, int(getattr(config, "type_vocab_size", 0) or 0)


def _own_head(directory: str, layout: _Layout, dtype: str, device: str) -> tuple[Forward, int]:
    """Return a backbone with one Linear on its first hidden state, and its number of segments."""
    from transformers import DistilBertModel, ElectraModel

    from pipelines.models.tower import EncoderTower
    from pipelines.models.weights import build_model, check_names, load_linear, read_config, read_weights

    state = read_weights(directory)
    names = {f"{layout.head}.weight", f"{layout.head}.bias"}
    own = {name for name in state if not name.startswith(layout.prefix)}
    check_names(sorted(names - own), sorted(own - names), directory, f"a {layout.backbone} with {layout.head}")
    head = load_linear(state[f"{layout.head}.weight"], state[f"{layout.head}.bias"])
    inner = {name.removeprefix(layout.prefix): t for name, t in state.items() if name.startswith(layout.prefix)}
    is_electra = layout.backbone == "electra"
    config = read_config(directory) if is_electra else _distilbert_config(directory, inner)
    model_class = ElectraModel if is_electra else DistilBertModel
    backbone = build_model(model_class, config, inner, dtype, directory, needs_pooler=True)
    tower = EncoderTower(backbone, layout.labels, ["cls"], [head]).on(device)
    return tower, int(getattr(config, "type_vocab_size", 0) or 0)


def _distilbert_config(directory: str, state: dict[str, Any]) -> Any:
    """Return the backbone's config: BERT_Cat names a model to download instead, so sizes come from the tensors.

    The number of heads leaves no trace in them: 64 wide each, as in every released DistilBERT, unless config.json says.
    """
    from transformers import DistilBertConfig

    raw = read_json(directory, "config.json")
    vocabulary, dim = state["embeddings.word_embeddings.weight"].shape
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.layer.")}
    known = {key: raw[key] for key in ("n_heads", "num_attention_heads", "activation") if key in raw}
    return DistilBertConfig(
        vocab_size=vocabulary,
        dim=dim,
        n_layers=len(layers),
        hidden_dim=state["transformer.layer.0.ffn.lin1.weight"].shape[0],
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        **({"n_heads": max(1, dim // 64)} | known),
    )


@dataclass
class PairScorer:
    """A classifier over (query, "title. text") pairs; both are stripped, as the models were trained."""

    classifier: TextClassifier

    def score(self, queries: Sequence[str], passages: Sequence[Passage]) -> npt.NDArray[np.float32]:
        """Return (N,) fp32 raw logits (or logit differences), one for each pair: query i with passage i."""
        pairs = zip(queries, passages, strict=True)
        texts: list[tokens.Text] = [(q.strip(), tokens.join_title(p.title.strip(), p.text.strip())) for q, p in pairs]
        logits_NC = self.classifier.logits(texts)
        return logits_NC[:, 0] if logits_NC.shape[1] == 1 else logits_NC[:, 1] - logits_NC[:, 0]


@dataclass
class PassageScorer:
    """A two-label classifier over the text of passages, without titles (Lewis et al. 2021, PAQ's passage selection)."""

    classifier: TextClassifier

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return (N,) fp32 log-probabilities of the second label, at most 0."""
        logits_NC = self.classifier.logits(list(texts))
        margin_N = logits_NC[:, -1] - logits_NC[:, 0]  # log softmax(l)[1] = -log(1 + exp(l0 - l1))
        return np.asarray(-np.logaddexp(0, -margin_N), dtype=np.float32)
