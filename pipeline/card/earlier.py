"""The cards of version 0.1. Its exports have no list of their files, so a card that was not changed by hand
is recognized by its text."""

import re

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [minrnn, {cell}]
---

# {name}

A minimal recurrent language model ({cell}, {parameters:,} parameters), \
pretrained with `minrnn` on `{corpus}`: {tokens:,} tokens{score}.
Its state has a fixed size, so time and memory per token do not grow with the context.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
inputs = tokenizer("def main", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200, do_sample=True)[0]))
```

## Training configuration

```yaml
{config}```
"""


def is_earlier_card(text: str) -> bool:
    """Whether a text is exactly a card of version 0.1, without changes by hand."""
    pattern = re.sub(r"\\\{config\\\}", lambda _: r"(?:(?!```)[\s\S])*", re.escape(CARD))
    pattern = re.sub(r"\\\{[\w:,]+\\\}", ".*", pattern)
    return re.fullmatch(pattern, text) is not None
