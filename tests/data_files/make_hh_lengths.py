"""Makes hh_lengths.npy, the prompt, chosen and rejected tokens of HH's pairs, from a file of them.

python -m tests.data_files.make_hh_lengths hh_harmless_base.jsonl.gz
"""

import pathlib
import sys
from types import SimpleNamespace

import numpy as np

from pjpo import models
from pjpo.data import preference

_, _, tokenizer = models.load("smollm2-135m-instruct")
examples = preference.Config(path=sys.argv[1]).build(SimpleNamespace(tokenizer=tokenizer)).train
lengths = [[len(example.prompt), *map(len, example.completions)] for example in examples]
np.save(pathlib.Path(__file__).with_name("hh_lengths.npy"), np.array(lengths, np.uint16))
