"""Fixtures of the data tests: small tokenizers of the kinds that matter, and the real rows."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = """My brother broke my bike at the park yesterday and I do not know what to do.
SUBREDDIT: r/relationships TITLE: POST: TL;DR: a b c d e f g h 0 1 2 3 4 5 6 7 8 9"""


def byte_level(texts: Iterable[str], vocab_size: int, *, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE like SmolLM2's (no BOS) or Llama-3's (BOS)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentence_piece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A BPE like Llama-2's: a blank in front of any text, no splitting at blanks, BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_fallback(texts: Iterable[str], vocab_size: int, *, old: bool) -> PreTrainedTokenizerFast:
    """Like `sentence_piece`, but every text has ids; the blank in front is put there by the
    pre-tokenizer, as in newer files of Llama 2, or by the normalizer, as in the old ones.
    """
    rules = json.loads(sentence_piece(texts, vocab_size).backend_tokenizer.to_str())
    vocab = rules["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    rules["model"] |= {"byte_fallback": True}
    rules["decoder"]["decoders"].insert(1, {"type": "ByteFallback"})
    if not old:
        rules["normalizer"] = None
        scheme = {"replacement": "▁", "prepend_scheme": "first", "split": False}
        rules["pre_tokenizer"] = {"type": "Metaspace", **scheme}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    """Tokenizer that puts a blank in front of the first text, and has ids for every text."""
    return byte_fallback(TEXT.split("\n"), 200, old=False)


@pytest.fixture(scope="session")
def prepending() -> PreTrainedTokenizerFast:
    """The same by a normalizer."""
    return byte_fallback(TEXT.split("\n"), 200, old=True)


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without BOS; EOS is 0."""
    return byte_level(TEXT.split("\n"), 400, bos=False)


@pytest.fixture(scope="session")
def llama_3() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer that splits by the expression of Llama 3; EOS is 0."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    rules = json.loads(byte_level(TEXT.split("\n"), 400, bos=False).backend_tokenizer.to_str())
    rules["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split | {"invert": False}, bytes_ | {"trim_offsets": True}],
    }
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """Like WordPiece of BERT: what it has no piece for is left out, or [UNK]; EOS is 1."""
    pieces = ["[UNK]", "</s>", "my", "bike", "a", "b", "##b", "##a", ":", "1", "##2", "broke"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="[UNK]")


@pytest.fixture(scope="session")
def with_bos() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with BOS 1; EOS is 0."""
    return byte_level(TEXT.split("\n"), 400, bos=True)


@pytest.fixture(scope="session")
def llama2_like() -> PreTrainedTokenizerFast:
    """Tokenizer that puts a blank in front of texts, with BOS 1; EOS is 2."""
    return sentence_piece(TEXT.split("\n"), 200)


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (objects, or raw lines) as a JSON lines file and returns its path."""

    def write(*rows: object, name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def tldr_folder() -> Path:
    """Folder with real `sft.jsonl` and `comparisons.jsonl`; skips where there is none."""
    place = os.environ.get("COPG_TLDR_DATA")
    folder = Path(place) if place else REPOSITORY.parent / "shared" / "data" / "tldr"
    if not (folder / "sft.jsonl").exists():
        pytest.skip(f"no real TL;DR rows at {folder}: set COPG_TLDR_DATA to their folder")
    return folder


SFT_ROW = {
    "id": "t3_a",
    "subreddit": "tifu",
    "title": "My bike",
    "post": "It broke.\nTwice.",
    "summary": "bike broke",
}
COMPARISON_ROW = {
    "info": {"id": "t3_a", "post": "It broke.\nTwice.", "title": "My bike", "subreddit": "tifu"},
    "summaries": [
        {"text": " bike broke", "policy": "a", "note": None},
        {"text": " no bike", "policy": "b", "note": None},
    ],
    "choice": 1,
    "worker": None,
    "batch": None,
    "split": None,
    "extra": {"confidence": None},
}
PROMPT = "SUBREDDIT: r/tifu\n\nTITLE: My bike\n\nPOST: It broke.\nTwice.\n\nTL;DR:"


@pytest.fixture
def sft_row() -> dict:
    """A row of OpenAI's TL;DR posts; its prompt is `prompt`."""
    return dict(SFT_ROW)


@pytest.fixture
def comparison_row() -> dict:
    """A row of OpenAI's comparisons; its prompt is `prompt`."""
    return json.loads(json.dumps(COMPARISON_ROW))


@pytest.fixture
def prompt() -> str:
    """The prompt of `sft_row` and `comparison_row`."""
    return PROMPT
