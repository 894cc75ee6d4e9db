"""Completes prompts with llama.cpp's server, as `generator.command` calls an engine.

    python -m tests.llama_cpp_engine METADATA.gguf NUM_SAMPLES MAX_NEW_TOKENS TEMPERATURE SEED \
        MODEL prompts.jsonl completions.jsonl

llama.cpp reads GGUF files and no Hugging Face folders. The weights of the folder MODEL are written
into one, in float32, with the metadata of METADATA.gguf, the file that the first policy is from.
"""

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import xllamacpp  # pyright: ignore[reportMissingImports]
from safetensors.numpy import load_file

from tests.gguf_writing import write_file

_SLOTS = 4  # completions that are written at a time
_PLACES = 256  # tokens of a prompt and its completion


def write_gguf(metadata: Path, model: Path, path: Path) -> None:
    """Writes the weights of a folder with the metadata of a file."""
    writer = gguf.GGUFWriter(path, "llama")
    own = ("GGUF.", "general.architecture", "general.file_type", "general.quantization")
    for name, field in gguf.GGUFReader(metadata).fields.items():
        if not name.startswith(own):
            of_list = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], of_list)
    config = json.loads((model / "config.json").read_text())
    write_file(writer, load_file(model / "model.safetensors"), config)


def start(path: Path) -> Any:
    """The server of a file, at an address of this machine."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = str(path), _SLOTS, _SLOTS * _PLACES
    # Attention in float32, as the weights are, and not in float16: then its probabilities are ours.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for processors in (params.cpuparams, params.cpuparams_batch):
        processors.n_threads = 1  # which wait for each other by spinning, and tests are not alone
    return xllamacpp.Server(params)


def main(metadata: str, *arguments: str) -> None:
    """Generates and writes."""
    num_samples, max_new_tokens, temperature, seed, model, prompts, out = arguments
    rows = [json.loads(line) for line in Path(prompts).read_text().split("\n") if line]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(Path(metadata), Path(model), path)
        server = start(path)

    def complete(number: int) -> dict[str, Any]:
        ids = rows[number // int(num_samples)]["prompt_token_ids"]
        asked = {"prompt": ids, "n_predict": int(max_new_tokens), "return_tokens": True}
        asked |= {"temperature": float(temperature), "seed": int(seed) + number, "n_probs": 1}
        asked |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # its defaults cut tokens off
        body = json.dumps(asked).encode()
        request = Request(
            f"{server.listening_address}/completion", body, {"Content-Type": "application/json"}
        )
        with urlopen(request) as answer:
            found = json.load(answer)
        assert found["tokens_evaluated"] == len(ids)  # no BOS of its own in front
        return found

    with ThreadPoolExecutor(_SLOTS) as pool:
        found = list(pool.map(complete, range(len(rows) * int(num_samples))))
    reasons = {"eos": "stop", "limit": "length"}
    with Path(out).open("w") as file:
        for at, row in enumerate(rows):
            own = found[at * int(num_samples) :][: int(num_samples)]
            row["completions"] = [[{"role": "assistant", "content": x["content"]}] for x in own]
            row["completion_token_ids"] = [x["tokens"] for x in own]
            row["finish_reason"] = [reasons[x["stop_type"]] for x in own]
            row["logp"] = [sum(p["logprob"] for p in x["completion_probabilities"]) for x in own]
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
