"""Small chat templates of the shapes that the field ships, each with the stretches that the assistant writes.

In `[[...]]` stands what is learned: as `{% generation %}` marks, transformers finds it in the marked template; from the
plain one it must be found without them.
"""

import copy
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Family:
    """A template, its tokens, and whether it writes turns in another way once others follow."""

    source: str
    eos: str
    tokens: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # added tokens that are not special
    bos: str | None = None
    rewrites: bool = False  # every turn
    rewrites_reasoning: bool = False

    def plain(self) -> str:
        return self.source.replace("[[", "").replace("]]", "")

    def marked(self) -> str:
        return self.source.replace("[[", "{%- generation -%}").replace("]]", "{%- endgeneration -%}")

    def tokenizer(self, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        tokenizer = copy.deepcopy(like)
        special = [token for token in (self.bos, self.eos, *self.tokens) if token]
        tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(special))})
        tokenizer.add_tokens(list(self.words))
        tokenizer.eos_token = self.eos
        tokenizer.bos_token = self.bos
        tokenizer.chat_template = self.plain()
        return tokenizer


CHATML = ("<|im_start|>", "<|im_end|>")
CHATML_PROMPT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
THINK = ("<think>", "</think>")
SPLIT = (  # content and reasoning of a message `m`
    "{%- set r = '' -%}{%- set c = m.content or '' -%}"
    "{%- if m.reasoning_content is string -%}{%- set r = m.reasoning_content -%}"
    "{%- elif '</think>' in c -%}"
    "{%- set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
)
LAST_QUERY = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)


def chatml(turn: str, prompt: str = CHATML_PROMPT, before: str = "", start: str = "") -> str:
    """Write every turn as ChatML, the assistant's with a body of its own."""
    return (
        before + start + "{%- for m in messages -%}{%- if m.role == 'assistant' -%}" + turn + "{%- else -%}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}" + prompt
    )


CALLS = (
    "{%- for t in m.tool_calls or [] -%}{%- set f = t.function if t.function is defined else t -%}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + f.name + \'", "arguments": \' }}{{ f.arguments | tojson }}'
    "{{ '}\\n</tool_call>' }}{%- endfor -%}"
)
QWEN_2_5 = (
    "{%- if tools -%}{{ '<|im_start|>system\\n# Tools' }}{%- for t in tools -%}{{ '\\n' }}{{ t | tojson }}"
    "{%- endfor -%}{{ '<|im_end|>\\n' }}{%- elif messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' or m.role == 'system' or (m.role == 'assistant' and not m.tool_calls) -%}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' -%}[[{{ m.content + '<|im_end|>' }}]]{{ '\\n' }}"
    "{%- else -%}{{ m.content + '<|im_end|>\\n' }}{%- endif -%}"
    "{%- elif m.role == 'assistant' -%}{{ '<|im_start|>assistant' }}{%- if not m.content -%}{%- endif -%}"
    "[[{%- if m.content -%}{{ '\\n' + m.content }}{%- endif -%}" + CALLS + "{{ '<|im_end|>' }}]]{{ '\\n' }}"
    "{%- elif m.role == 'tool' -%}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- endif -%}{%- endfor -%}" + CHATML_PROMPT
)
QWEN_3 = chatml(
    SPLIT + "{{ '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last -%}[[{{ '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' + c.lstrip('\\n') + "
    "'<|im_end|>' }}]]{%- else -%}[[{{ c + '<|im_end|>' }}]]{%- endif -%}{{ '\\n' }}",
    before=LAST_QUERY,
)
QWEN_3_5 = chatml(  # the prompt opens the reasoning
    SPLIT + "{{ '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last -%}{{ '<think>\\n' }}[[{{ r | trim + '\\n</think>\\n\\n' + c | trim + "
    "'<|im_end|>' }}]]{%- else -%}[[{{ c | trim + '<|im_end|>' }}]]{%- endif -%}{{ '\\n' }}",
    prompt="{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}",
    before=LAST_QUERY,
)
NEMOTRON_3 = chatml(
    SPLIT + "{{ '<|im_start|>assistant\\n<think>' }}"
    "{%- if loop.index0 > ns.last and r -%}{{ '\\n' }}[[{{ r + '\\n</think>' + c + '<|im_end|>' }}]]"
    "{%- else -%}[[{{ '</think>' + c + '<|im_end|>' }}]]{%- endif -%}{{ '\\n' }}",
    prompt="{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}",
    before=LAST_QUERY,
)
LLAMA_3 = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{%- if m.role == 'assistant' -%}[[{{ m.content | trim + '<|eot_id|>' }}]]"
    "{%- else -%}{{ m.content | trim + '<|eot_id|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)


def gemma(content: str) -> str:
    return (
        "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\\n\\n' -%}"
        "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
        "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('roles must alternate') }}{%- endif -%}"
        "{%- if m.role == 'assistant' -%}{{ '<start_of_turn>model\\n' }}[["
        + content
        + "{{ '<end_of_turn>\\n' }}]]{%- else -%}"
        "{{ '<start_of_turn>' + m.role + '\\n' + (first if loop.first else '') }}"
        + content
        + "{{ '<end_of_turn>\\n' }}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    )


GEMMA_3_CONTENT = (
    "{%- if m.content is string -%}{{ m.content | trim }}{%- else -%}"
    "{%- for part in m.content -%}{{ part.text | trim }}{%- endfor -%}{%- endif -%}"
)
PHI_3 = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' }}"
    "{%- if m.role == 'assistant' -%}[[{{ m.content + '<|end|>\\n' }}"
    "{%- if loop.last and not add_generation_prompt -%}{{ eos_token }}{%- endif -%}]]"
    "{%- else -%}{{ m.content + '<|end|>\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
MISTRAL = (
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- if tools and loop.index0 == messages | map(attribute='role') | list | length - 1 -%}"
    "{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{%- endif -%}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'assistant' -%}[[{{ ' ' + m.content | trim + eos_token }}]]"
    "{%- else -%}{{ raise_exception('only user and assistant') }}{%- endif -%}{%- endfor -%}"
)


def deepseek(prompt: str, content: str) -> str:
    return (
        "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<|User|>' + m.content }}"
        "{%- elif m.role == 'system' -%}{{ m.content }}"
        "{%- elif m.role == 'assistant' and m.content is none -%}{{ '<|Assistant|>' }}"
        "[[{%- for t in m.tool_calls -%}{{ '<|call|>' + t['function']['name'] + '\\n' + t['function']['arguments'] }}"
        "{%- endfor -%}{{ eos_token }}]]"
        "{%- elif m.role == 'assistant' -%}{{ '<|Assistant|>' }}[[{{ " + content + " + eos_token }}]]"
        "{%- elif m.role == 'tool' -%}{{ '<|output|>' + m.content }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '" + prompt + "' }}{%- endif -%}"
    )


GLM_4 = (
    LAST_QUERY + "{{ '[gMASK]<sop>' }}{%- for m in messages -%}{%- if m.role == 'assistant' -%}" + SPLIT + "{{ "
    "'<|assistant|>' }}[[{{ '\\n<think>' + (r.strip() if loop.index0 > ns.last else '') + '</think>' }}"
    "{%- if c.strip() -%}{{ '\\n' + c.strip() }}{%- endif -%}]]"
    "{%- else -%}{{ '<|' + m.role + '|>\\n' + m.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are ChatGPT.<|end|>' }}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}{{ '<|start|>assistant' }}"
    "{%- if loop.last and not add_generation_prompt -%}"
    "[[{%- if m.thinking -%}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}"
    "{%- endif -%}{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}]]"
    "{%- else -%}[[{{ '<|channel|>final<|message|>' + m.content + '<|end|>' }}]]{%- endif -%}"
    "{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
)


def cohere(answer: str, end: str) -> str:
    turn = "<|START_OF_TURN_TOKEN|>"
    return (
        "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{ '" + turn + "<|CHATBOT_TOKEN|>' }}"
        "[[{{ '" + answer + "' + m.content | trim + '" + end + "<|END_OF_TURN_TOKEN|>' }}]]"
        "{%- else -%}{{ '" + turn + "<|' + m.role | upper + '_TOKEN|>' + m.content | trim + '<|END_OF_TURN_TOKEN|>' }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '" + turn + "<|CHATBOT_TOKEN|>' }}{%- endif -%}"
    )


HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>")
DEEPSEEK = ("<|User|>", "<|Assistant|>", "<|call|>", "<|output|>")

FAMILIES = {
    "llama-3": Family(LLAMA_3, "<|eot_id|>", HEADERS, bos="<|begin_of_text|>"),
    "qwen2.5": Family(QWEN_2_5, "<|im_end|>", CHATML, words=("<tool_call>", "</tool_call>")),
    "qwen3": Family(QWEN_3, "<|im_end|>", CHATML, words=THINK, rewrites=True),
    "qwen3.5": Family(QWEN_3_5, "<|im_end|>", CHATML, words=THINK, rewrites=True),
    "qwen3.6, no token for think": Family(QWEN_3_5, "<|im_end|>", CHATML, rewrites=True),
    "gemma": Family(gemma("{{ m.content | trim }}"), "<eos>", TURNS, bos="<bos>"),
    "gemma-3": Family(gemma(GEMMA_3_CONTENT), "<eos>", TURNS, bos="<bos>"),
    "phi-3": Family(PHI_3, "<|endoftext|>", (*ROLES, "<|end|>")),
    "phi-3, no tokens": Family(PHI_3, "<|endoftext|>", ("<|end|>",)),
    "mistral": Family(MISTRAL, "</s>", ("[INST]", "[/INST]"), bos="<s>"),
    "deepseek-v3": Family(
        deepseek("<|Assistant|></think>", "m.content"), "<|eos|>", DEEPSEEK, words=THINK, bos="<|bos|>"
    ),
    "deepseek-r1": Family(
        deepseek("<|Assistant|><think>\\n", "m.content.split('</think>')[-1]"),
        "<|eos|>",
        DEEPSEEK,
        THINK,
        bos="<|bos|>",
    ),
    "glm-4-moe": Family(GLM_4, "<|endoftext|>", ("[gMASK]", "<sop>", *ROLES), words=THINK, rewrites_reasoning=True),
    "gpt-oss": Family(GPT_OSS, "<|return|>", HARMONY, rewrites_reasoning=True),
    "cohere": Family(cohere("", ""), "<|END_OF_TURN_TOKEN|>", COHERE, bos="<BOS_TOKEN>"),
    "cohere-2": Family(
        cohere("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        "<|END_OF_TURN_TOKEN|>",
        (*COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        bos="<BOS_TOKEN>",
    ),
    "nemotron-3": Family(NEMOTRON_3, "<|im_end|>", CHATML, words=THINK, rewrites_reasoning=True),
    "lfm2": Family(
        chatml(
            "{{ '<|im_start|>assistant\\n' }}[[{{ m.content + '<|im_end|>' }}]]{{ '\\n' }}", start="{{ bos_token }}"
        ),
        "<|im_end|>",
        CHATML,
        bos="<|startoftext|>",
    ),
}
