"""Rows that mean nothing, and files and folders of rows that cannot be read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_inputs.ground import (
    GOOD,
    GOOD_PAIR,
    Case,
    Ground,
    files,
    lines,
    parquet,
    rows,
    runs,
    write,
)

HIGH, LOW = "\\ud83d", "\\udc00"  # halves of characters, as JSON writes them
DEEP = 10_000
DIGITS = "9" * 5_000
GROUP = {"prompt": "Say a.", "completions": ["a", "b"], "rewards": [1.0, 0.0]}
POST = {"subreddit": "s", "title": "t", "post": "p", "summary": "x"}
COMPARISON = {
    "info": {"id": "i", "post": "p", "title": "t", "subreddit": "s"},
    "summaries": [{"text": "a"}, {"text": "b"}],
    "choice": 1,
}
SCORES = GOOD_PAIR | {"score_chosen": 1, "score_rejected": 0}
ASKS, SAYS = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHOSEN = {"messages": [ASKS, SAYS]}
PATH = "data.path=HERE/data"


def line(name: str, second: Any, *words: str, first: Any = GOOD, stage: str = "sft") -> Case:
    """A row at the second line; the first is good."""
    return Case(name, rows(stage, first, second), ("rows.jsonl:2", *words))


def field(name: str, row: dict[str, Any], words: str, first: Any = None) -> Case:
    """A row whose field is at fault."""
    stage = "sft" if {"completion", "label", "summary"} & row.keys() else "reward"
    return line(
        name, row, words, first=first or (GOOD if stage == "sft" else GOOD_PAIR), stage=stage
    )


def read(name: str, make: Any, *words: str, path: str = PATH, stage: str = "sft") -> Case:
    """A file or folder that a stage cannot read."""

    def make_data(ground: Ground, here: Path) -> None:
        (here / "data").mkdir()
        if make is not None:
            make(ground, here / "data")

    return Case(name, runs(stage, *path.split(" "), make=make_data), words)


def only(*given: Any, stage: str, name: str, words: tuple[str, ...], more: Any = ()) -> Case:
    """A data set whose rows are each good, and mean nothing to the stage."""
    return Case(name, rows(stage, *given, more=more), words)


def raw(row: dict[str, Any], **fields: str) -> str:
    """A row with fields of the JSON that is given, where no object has such values."""
    text = json.dumps(row | {name: f"@{name}" for name in fields})
    for name, value in fields.items():
        text = text.replace(f'"@{name}"', value)
    return text


def strange(name: str, row: dict[str, Any], *words: str, **fields: str) -> Case:
    """A row with such a field at the second line."""
    stage = "sft" if row is GOOD else "reward"
    return line(name, raw(row, **fields), *words, first=row, stage=stage)


SURROGATES = [
    strange("half a character in a prompt", GOOD, prompt=f'"{HIGH}"'),
    strange("half a character in a completion", GOOD, completion=f'"a{LOW}"'),
    strange("half a character in a column", GOOD, x=f'"{HIGH}"'),
    strange("half a character deep in a column", GOOD, x=f'[{{"y": ["{LOW}"]}}]'),
    strange("half a character in an id", GOOD, id=f'"{HIGH}"'),
    strange("half a character in a rejected text", GOOD_PAIR, rejected=f'"{HIGH}{HIGH}"'),
    strange("half a character in one of many", GROUP, completions=f'["a", "{LOW}{HIGH}"]'),
    line("half a character in a name", json.dumps(GOOD)[:-1] + f', "{HIGH}": 1}}'),
]
MONSTERS = [
    strange("lists nested deep", GOOD, x="[" * DEEP + "]" * DEEP),
    strange("objects nested deep", GOOD, x='{"a":' * DEEP + "1" + "}" * DEEP),
    strange("an integer of 5,000 digits", GOOD, x=DIGITS),
    strange("an id of 5,000 digits", GOOD, id=f"-{DIGITS}"),
    strange("a reward of 400 digits", GROUP, "rewards", rewards=f"[1, {10**400}]"),
    strange("a reward of 5,000 digits", GROUP, rewards=f"[1, {DIGITS}]"),
    strange("a score of 1e999", SCORES, "score_chosen", score_chosen="1e999"),
    strange("a score of minus 400 digits", SCORES, "score_rejected", score_rejected=f"-{10**400}"),
    strange("a choice of 400 digits", COMPARISON, "choice", choice=str(10**400)),
    line("brackets that never close", "[" * DEEP),
]
LINES = [
    line("a list as a row", '["a", "b"]'),
    line("null as a row", "null"),
    line("a text as a row", '"a"'),
    line("a row cut short", '{"prompt": "p", "compl'),
    line("two rows on a line", json.dumps(GOOD) * 2),
    line("a comma behind a row", json.dumps(GOOD) + ","),
    line("single quotes", "{'prompt': 'p', 'completion': 'a'}"),
    line("a line of Latin-1", b'{"prompt": "\xe9", "completion": "a"}\n'),
    line("a character cut short", b'{"prompt": "\xf0\x9f", "completion": "a"}\n'),
    line("bytes of something else", bytes(range(128, 256)) + b"\n"),
    line("a comment", "// the second row"),
    line("an empty object", "{}", "prompt"),
    line("a question alone", {"messages": [ASKS]}, "messages"),
    line("a message without a role", {"messages": [{"content": "a"}, SAYS]}, "messages[0].role"),
    line("a message without text", {"messages": [{"role": "user"}, SAYS]}, "messages[0].content"),
    line("a role that there is not", {"messages": [ASKS | {"role": "critic"}, SAYS]}, "critic"),
    line("two answers", {"messages": [ASKS, SAYS, SAYS]}, "turn of the user"),
    line("messages of tools", {"messages": [ASKS, SAYS], "tools": [{"name": "f"}]}, "tools"),
    line("an answer in text to messages", {"prompt": [ASKS], "completion": "b"}, "prompt"),
    line("NUL in a text", {"prompt": "p", "completion": "a\0"}, "completion", "NUL"),
    line("a prompt without an answer", {"prompt": "p"}, "completion"),
    line("an answer that spells the end", {"prompt": "p", "completion": "a</s>b"}, "</s>"),
]
FIELDS = [
    field("a label that is null", {"prompt": "p", "label": None}, "label"),
    field("a completion of blanks", {"prompt": "p", "completion": " \n\t"}, "completion"),
    field("a completion that is a list", {"prompt": "p", "completion": ["a"]}, "completion"),
    field("a prompt that is an object", {"prompt": {"text": "p"}, "completion": "a"}, "prompt"),
    field("a post that is a number", POST | {"post": 3}, "post", first=POST),
    field("a summary that is null", POST | {"summary": None}, "summary", first=POST),
    field("an info that is a text", COMPARISON | {"info": "i"}, "info", first=COMPARISON),
    field("summaries that are an object", COMPARISON | {"summaries": {"text": "a"}}, "summaries",
          first=COMPARISON),
    field("a summary that is a text", COMPARISON | {"summaries": ["a", "b"]}, "summaries[0]",
          first=COMPARISON),
    field("three summaries", COMPARISON | {"summaries": [{"text": x} for x in "abc"]}, "summaries",
          first=COMPARISON),
    field("a choice that is a list", COMPARISON | {"choice": [1]}, "choice", first=COMPARISON),
    field("a choice that is not a number", COMPARISON | {"choice": float("nan")}, "choice",
          first=COMPARISON),
    field("rewards that are an object", GROUP | {"rewards": {"a": 1, "b": 0}}, "rewards",
          first=GROUP),
    field("rewards in lists of their own", GROUP | {"rewards": [[1], [0]]}, "rewards[0]",
          first=GROUP),
    field("more rewards than completions", GROUP | {"rewards": [1, 0, 2]}, "rewards", first=GROUP),
    field("a completion that is an object", GROUP | {"completions": ["a", {"text": "b"}]},
          "completions[1]", first=GROUP),
    field("a pair of lists", {"prompt": "p", "chosen": ["a"], "rejected": ["b"]}, "chosen"),
    field("a score that is a list", GOOD_PAIR | {"reward_chosen": [1], "reward_rejected": 0},
          "reward_chosen", first=GOOD_PAIR | {"reward_chosen": 1, "reward_rejected": 0}),
]  # fmt: skip

COLUMNS = "data.columns={prompt: question}"
MEANT_OTHERWISE = [
    only(*[CHOSEN] * 9, stage="sft", name="messages for a tokenizer without a template",
         words=("base: the data have messages", "chat template")),
    only(*[GOOD] * 9, stage="sft", name="messages that are texts", more=["data.format=chat"],
         words=("rows.jsonl:1", "data.format=text")),
    only(*[CHOSEN] * 9, stage="sft", name="texts that are messages", more=["data.format=text"],
         words=("rows.jsonl:1", "data.format=chat")),
    only(*[GOOD] * 9, stage="sft", name="a column that is not there", more=[COLUMNS],
         words=("rows.jsonl:1", "question", "'completion', 'prompt'")),
    only(*[GOOD | {"question": "q"}] * 9, stage="sft", name="two columns for one", more=[COLUMNS],
         words=("rows.jsonl:1", "question", "'prompt' too")),
    only(*[GOOD] * 9, stage="reward", name="a reward model of single answers",
         words=("rows.jsonl:1", "chosen", "rejected")),
    only(*[{"prompt": "p"}] * 9, stage="score", name="scores of prompts alone",
         words=("rows.jsonl:1", "no completion", "completions")),
    only(*[GOOD_PAIR] * 9, stage="policy", name="a policy on rows that are not scored",
         words=("data.path", "experiments.score")),
]  # fmt: skip

TIED = GROUP | {"rewards": [0.5, 0.5]}
NOTHING_TO_LEARN = [
    only(*[TIED] * 9, stage="reward", name="a reward model of ties", words=("data",)),
    only(*[GROUP | {"rewards": [None, 1.0]}] * 9, stage="reward",
         name="a reward model of single completions", words=("reward",)),
    only(*[GROUP | {"rewards": [2.0] * len(GROUP["completions"])}] * 9, stage="reward",
         name="a reward model of equal scores", words=("data",)),
    only(*[{"prompt": "p", "completions": ["a", "b", "c"]}] * 9, stage="reward",
         name="a reward model of groups without rewards", words=("rewards",)),
    only(*[GOOD] * 9, stage="sft", name="no row on this side of the posts",
         more=["data.holdout_fraction=0.999999", "data.part=train"], words=("data.part",)),
    only(*[GOOD | {"split": "test"}] * 9, stage="sft", name="rows of another split alone",
         words=("data.split",)),
    only(*[{"prompt": "", "completion": ""}] * 9, stage="sft", name="bad rows alone, left out",
         more=["data.invalid_rows=drop"], words=("empty",)),
    only(*[GOOD | {"completion": "word " * 200}] * 9, stage="sft",
         name="completions over the limit alone", words=("completion over 96 tokens",)),
]  # fmt: skip


def link_to_nothing(ground: Ground, here: Path) -> None:
    """A link whose target is gone."""
    (here / "rows.jsonl").symlink_to(here / "gone.jsonl")


def cut_parquet(share: float) -> Any:
    """The first part of a Parquet file."""

    def make(ground: Ground, here: Path) -> None:
        pq.write_table(pa.Table.from_pylist([GOOD] * 99), here / "rows.parquet")
        content = (here / "rows.parquet").read_bytes()
        write(here / "rows.parquet", content[: int(len(content) * share)])

    return make


def overwritten_parquet(ground: Ground, here: Path) -> None:
    """A Parquet file with zeros among its values."""
    pq.write_table(pa.Table.from_pylist([GOOD | {"id": str(i)} for i in range(999)]),
                   here / "rows.parquet")  # fmt: skip
    content = bytearray((here / "rows.parquet").read_bytes())
    content[8:400] = bytes(392)
    write(here / "rows.parquet", bytes(content))


def two_kinds(ground: Ground, here: Path) -> None:
    """The same rows in two files."""
    write(here / "train.jsonl", lines(*[GOOD] * 9))
    pq.write_table(pa.Table.from_pylist([GOOD] * 9), here / "train.parquet")


NINE = lines(*[GOOD] * 9)
FILES = [
    read("an empty file", files(rows__jsonl=b""), "rows.jsonl", path=f"{PATH}/rows.jsonl"),
    read("a file of blank lines", files(rows__jsonl=b"\n \n\n"), "rows.jsonl",
         path=f"{PATH}/rows.jsonl"),
    read("half a compressed file", files(rows__jsonl__gz=gzip.compress(NINE)[:40]),
         "rows.jsonl.gz", path=f"{PATH}/rows.jsonl.gz"),
    read("a compressed file that is none", files(rows__jsonl__zst=NINE), "rows.jsonl.zst",
         path=f"{PATH}/rows.jsonl.zst"),
    read("a folder of tables", files(rows__csv=b"prompt,completion\na,b\n"), "rows.csv",
         "parquet.write_table"),
    read("a compressed file named otherwise", files(rows__jsonl=gzip.compress(NINE)),
         "rows.jsonl:1", path=f"{PATH}/rows.jsonl"),
    read("a file of tables", files(rows__tsv=b"prompt\tcompletion\n"), "rows.tsv",
         path=f"{PATH}/rows.tsv"),
    read("an array whose second item is no row", files(rows__json=f"[{json.dumps(GOOD)}, 3]"),
         "rows.json", path=f"{PATH}/rows.json"),
    read("an array that does not end", files(rows__json=f"[{json.dumps(GOOD)},\n"), "rows.json",
         path=f"{PATH}/rows.json"),
    read("an array with half a character",
         files(rows__json=f'[{json.dumps(GOOD)}, {{"prompt": "{HIGH}", "completion": "a"}}]'),
         "rows.json", path=f"{PATH}/rows.json"),
    read("an object over many lines", files(rows__json=json.dumps({"rows": [GOOD]}, indent=1)),
         "rows.json:1", path=f"{PATH}/rows.json"),
    read("a folder with a link to nothing",
         lambda *place: [files(more__jsonl=NINE)(*place), link_to_nothing(*place)],
         "rows.jsonl", "gone.jsonl"),
    read("a link to nothing", link_to_nothing, "rows.jsonl", path=f"{PATH}/rows.jsonl"),
    read("half a Parquet file", cut_parquet(0.5), "rows.parquet", path=f"{PATH}/rows.parquet"),
    read("an empty Parquet file", cut_parquet(0), "rows.parquet", path=f"{PATH}/rows.parquet"),
    read("a Parquet file with zeros inside", overwritten_parquet, "rows.parquet",
         path=f"{PATH}/rows.parquet"),
    read("JSON lines named as Parquet", files(rows__parquet=NINE), "rows.parquet",
         path=f"{PATH}/rows.parquet"),
    read("a folder named as a file", files(rows__jsonl___notes__txt=b"a"), "rows.jsonl",
         path=f"{PATH}/rows.jsonl"),
    read("a pattern that fits nothing", files(a__txt=b""), "*.jsonl", path=f"{PATH}/*.jsonl"),
    read("a pattern that fits no data", files(rows__csv=b"a"), "rows.csv", path=f"{PATH}/rows.*"),
    read("a folder that is not there", None, "HERE/data/nowhere", path=f"{PATH}/nowhere"),
    read("a path with a line break", None, "HERE/data/a", path=f"{PATH}/a\n/b"),
    Case("Parquet without the columns", parquet("sft", ("text", ["a"] * 9)), ("rows.parquet:1",)),
    Case("Parquet with numbers for prompts",
         parquet("sft", ("prompt", [1] * 9), ("completion", ["a"] * 9)),
         ("rows.parquet:1", "prompt")),
    Case("Parquet with bytes that are no text",
         parquet("sft", ("prompt", pa.array([b"\xff"] * 9)), ("completion", ["a"] * 9)),
         ("rows.parquet:1", "prompt")),
    Case("Parquet with texts that are no UTF-8",
         parquet("sft", ("prompt", pa.array([b"\xff"] * 9).view(pa.string())),
                 ("completion", ["a"] * 9)),
         ("rows.parquet",)),
    Case("Parquet with a column twice",
         parquet("sft", ("prompt", ["a"] * 9), ("prompt", ["b"] * 9), ("completion", ["a"] * 9)),
         ("rows.parquet", "prompt")),
    Case("Parquet with nulls",
         parquet("sft", ("prompt", ["a"] * 8 + [None]), ("completion", ["a"] * 9)),
         ("rows.parquet:9", "prompt")),
]  # fmt: skip
FOLDERS = [
    read("a folder of copies of a notebook alone",
         files(__ipynb_checkpoints___train__jsonl=NINE), "HERE"),
    read("a folder with hidden files alone", files(__rows__jsonl=NINE), "HERE"),
    read("a folder with metadata alone", files(dataset_info__json=b"{}", state__json=b"{}"),
         "HERE"),
    read("a split that no file is of", files(train__jsonl=NINE, val__jsonl=NINE), "test",
         path=f"{PATH} data.split=test"),
    read("a folder of development rows", files(dev__jsonl=NINE), "train"),
    read("a folder of rows to evaluate on", files(eval___rows__jsonl=NINE), "train"),
    read("the same rows in two kinds of files", two_kinds, "train.jsonl", "train.parquet"),
    read("a data set of the hub, not to be had", None, "runs/typo", path="data.path=runs/typo"),
    read("posts beside comparisons", files(a__jsonl=lines(*[POST] * 9),
                                           b__jsonl=lines(*[COMPARISON] * 9)), "b.jsonl:1"),
]  # fmt: skip

CASES = [
    *(*SURROGATES, *MONSTERS, *LINES, *FIELDS),
    *(*MEANT_OTHERWISE, *NOTHING_TO_LEARN, *FILES, *FOLDERS),
]
