"""Write the tokeniser files of the kinds that sentence-transformers models have."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.checkpoints import WORDS, bert_vocabulary, write_bert_tokeniser, write_spiece

LINES = [
    "The library of Alexandria was the first great library.",
    "who built the city? what is a scroll?",
    "A king wrote it in a book of 9,787 rivers, 78 wars",
    "Ägypten, café, naïve 図書館 библиотека",
]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "xlm-roberta": "XLMRoberta",
    "mpnet": "MPNet",
    "albert": "Albert",
}


def write_tokeniser(folder: str, backbone: str, *, fast: bool = True, cased: bool = False, silent: bool = False) -> int:
    """Write the tokeniser files the released models of this backbone have. Returns the size of the vocabulary.

    fast: write tokenizer.json; otherwise only what slow tokenisers read. XLM-R always has sentencepiece.bpe.model.
    """
    if backbone in ("bert", "distilbert"):
        settings: dict[str, Any] = {} if silent else {"do_lower_case": not cased}
        return write_bert_tokeniser(folder, fast=fast, cased=cased, settings=settings | {"model_max_length": 512})
    writers = {"roberta": write_byte_pairs, "xlm-roberta": write_sentencepiece, "mpnet": write_mpnet}
    if backbone == "albert":
        size = write_spiece(folder)
        write_json(folder, "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})
        if fast:
            _write_albert_json(folder)
        return size
    size = writers[backbone](folder)
    if fast:
        _write_fast(folder, backbone)
    return size


def write_byte_pairs(folder: str) -> int:
    """Write RoBERTa's vocab.json and merges.txt."""
    for name, content in _byte_pairs().items():
        write_text(folder, name, content)
    write_json(folder, "tokenizer_config.json", {"model_max_length": 512})
    return len(json.loads(_byte_pairs()["vocab.json"]))


@functools.cache
def _byte_pairs() -> dict[str, str]:
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(LINES * 3, vocab_size=360, special_tokens=ROBERTA_SPECIAL, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_model(folder)
        return {name: Path(folder, name).read_text(encoding="utf-8") for name in ("vocab.json", "merges.txt")}


def write_sentencepiece(folder: str) -> int:
    """Write XLM-R's sentencepiece.bpe.model; its ids are shifted by one, after fairseq's special tokens."""
    os.makedirs(folder, exist_ok=True)
    Path(folder, "sentencepiece.bpe.model").write_bytes(sentencepiece_model())
    write_json(folder, "tokenizer_config.json", {"model_max_length": 512})
    return len(sentencepiece_processor()) + 2


@functools.cache
def sentencepiece_model() -> bytes:
    """Return a trained unigram model with the normalisation that XLM-R's has."""
    import io

    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*LINES * 5, *WORDS * 5]),
        model_writer=buffer,
        vocab_size=150,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return buffer.getvalue()


def sentencepiece_processor() -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


def write_mpnet(folder: str) -> int:
    """Write MPNet's vocab.txt: RoBERTa's special tokens before BERT's lower-cased pieces."""
    pieces = [*("<s>", "<pad>", "</s>", "<unk>", "[UNK]"), *bert_vocabulary()[5:], "<mask>"]
    write_text(folder, "vocab.txt", "\n".join(pieces) + "\n")
    write_json(folder, "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})
    return len(pieces)


def _write_fast(folder: str, backbone: str) -> None:
    """Add the tokenizer.json that transformers makes of the slow files."""
    import transformers

    with tempfile.TemporaryDirectory() as saved:
        getattr(transformers, f"{CLASSES[backbone]}Tokenizer").from_pretrained(folder).save_pretrained(saved)
        write_text(folder, "tokenizer.json", Path(saved, "tokenizer.json").read_text(encoding="utf-8"))


def _write_albert_json(folder: str) -> None:
    """Add a tokenizer.json as the hub's: its pieces "digit + comma" already score lower."""
    import transformers

    backend = json.loads(transformers.AlbertTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    for entry in backend["model"]["vocab"]:
        if len(entry[0]) > 1 and entry[0][-1] == "," and entry[0][-2].isdigit():
            entry[1] -= 100.0
    write_text(folder, "tokenizer.json", json.dumps(backend))


def write_text(folder: str, name: str, text: str) -> None:
    os.makedirs(folder, exist_ok=True)
    Path(folder, name).write_text(text, encoding="utf-8")


def write_json(folder: str, name: str, content: Any) -> None:
    write_text(folder, name, json.dumps(content, indent=2))
