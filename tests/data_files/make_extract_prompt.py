"""Makes extract_prompt.json: where TRL 1.16 splits texts and chats that share a beginning.

Needs trl, which tests do not:
python tests/data_files/make_extract_prompt.py
"""

import json
import pathlib
import random

from trl.data_utils import extract_prompt

random.seed(0)
WORDS = ["The", " sky", " is", " blue", " green", ".", " ", "  ", "\n", "é", "th"]


def text(number):
    return "".join(random.choices(WORDS, k=number))


def turns(number, first=0):
    roles = ("user", "assistant")
    return [{"role": roles[(first + i) % 2], "content": text(2)} for i in range(number)]


pairs = [("The sky is blue.", "The sky is green."), ("The sky is", "The sky"), ("a", "a b"), ("The ", "The sky")]
for _ in range(20):
    shared = "The" + text(random.randint(1, 4))
    pairs.append((shared + text(random.randint(1, 3)), shared + text(random.randint(1, 3))))
for shared, chosen, rejected in [(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (2, 2, 2), (1, 3, 3)]:
    first = turns(shared)
    pairs.append((first + turns(chosen, shared), first + turns(rejected, shared)))
chat = turns(4)
pairs += [(chat[:2], chat), (chat, chat[:2])]
cases = [
    [chosen, rejected, extract_prompt({"chosen": chosen, "rejected": rejected})]
    for chosen, rejected in pairs
    if chosen != rejected
]
pathlib.Path(__file__).with_name("extract_prompt.json").write_text(
    json.dumps(cases, ensure_ascii=False, indent=0) + "\n"
)
