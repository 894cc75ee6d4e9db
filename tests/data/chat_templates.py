"""Chat templates with the traits of those in use, and small tokenizers that have them."""

from typing import NamedTuple

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import TEXT, byte_fallback, byte_level

_TURN = "'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{% for m in messages %}{{ " + _TURN + " }}{% endfor %}" + _OPEN
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
)
# Every question begins with BOS; the system turn is written into the first one; texts are trimmed.
LLAMA_2 = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for m in turns -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/...') -}}
  {%- endif -%}
  {%- if m['role'] == 'user' -%}
    {%- set text = system + m['content'] if loop.first else m['content'] -%}
    {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' -}}
  {%- else -%}{{- ' ' + m['content'].strip() + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}"""
LLAMA_3 = """\
{%- for m in messages -%}
  {%- set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'
      + m['content'] | trim + '<|eot_id|>' -%}
  {%- if loop.first -%}{%- set text = bos_token + text -%}{%- endif -%}
  {{- text -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""
# BOS once; the system turn is written into the last question.
MISTRAL = """\
{{- bos_token -}}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{%- for m in turns -%}
  {%- if m['role'] == 'user' -%}
    {%- set last = turns | selectattr('role', 'equalto', 'user') | list | last -%}
    {{- '[INST] ' + (system if m == last else '') + m['content'] + '[/INST]' -}}
  {%- elif m['role'] == 'assistant' -%}{{- ' ' + m['content'] | trim + eos_token -}}
  {%- else -%}{{- raise_exception('Only user and assistant roles are supported') -}}{%- endif -%}
{%- endfor -%}"""
# Thoughts of turns before the last question are left out, and the last answer always has some.
QWEN_3 = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}
{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- set text = m['content'] -%}
  {%- if m['role'] == 'assistant' -%}
    {%- set thought = m['reasoning_content'] if m['reasoning_content'] is string else '' -%}
    {%- if '</think>' in text -%}
      {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if loop.index0 > ns.last -%}
      {%- set text = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text -%}
    {%- endif -%}
  {%- endif -%}
  {{- '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {%- endif -%}
{%- endif -%}"""
# A conversation that is over ends in a token of its own, behind the turn's.
PHI_3 = """\
{%- for m in messages -%}
  {{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}"""
# Not prefix-preserving: an answer's thoughts are begun by the prompt, and then left out.
THINKING = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
ENDLESS = CHATML.replace("'<|im_end|>\\n'", "'\\n'")


class Kind(NamedTuple):
    """A template, and the tokens of the tokenizers that have it."""

    template: str
    end: str  # of a turn
    eos: str
    bos: str | None = None
    pieces: bool = False  # a tokenizer like SentencePiece's, which puts a blank in front of texts


KINDS = {
    "Llama-2-chat": Kind(LLAMA_2, "</s>", "</s>", "<s>", pieces=True),
    "Llama-3": Kind(LLAMA_3, "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>"),
    "Qwen2.5": Kind(_DEFAULT_SYSTEM + CHATML, "<|im_end|>", "<|im_end|>"),
    "Qwen3": Kind(QWEN_3, "<|im_end|>", "<|im_end|>"),
    "SmolLM2": Kind(_DEFAULT_SYSTEM + CHATML, "<|im_end|>", "<|im_end|>", "<|im_start|>"),
    "Mistral": Kind(MISTRAL, "</s>", "</s>", "<s>", pieces=True),
    "ChatML": Kind(CHATML, "<|im_end|>", "</s>"),
    "Phi-3": Kind(PHI_3, "<|im_end|>", "<|endoftext|>"),
}
_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>"]


def chat_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """A tokenizer of this kind; one that has a BOS puts it in front of a text by itself, too."""
    if kind.pieces:
        tokenizer = byte_fallback(TEXT.split("\n"), 200, old=False)
    else:
        tokenizer = byte_level(TEXT.split("\n"), 360, bos=kind.bos == "<s>")
        special = {kind.eos, kind.end, *([kind.bos] if kind.bos else []), *_TOKENS} - {"</s>"}
        tokenizer.add_tokens([AddedToken(token, special=True) for token in sorted(special)])
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.bos_token, tokenizer.eos_token = kind.bos, kind.eos
    tokenizer.chat_template = kind.template
    return tokenizer
