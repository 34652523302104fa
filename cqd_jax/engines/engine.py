"""Who produces text: what an engine is. `local` is the decoder in this process; a served model is one as well.

To bring your own, write a class with `fingerprint` and `generate` (see `Engine`) and a function that makes it, and name
the function in YAML:

```python
class Shouting:
  fingerprint = "shouting-1"

  def generate(self, individuals, requests):
    return [[request.messages[-1].content.upper() for request in own] for own in requests]


def shouting(interface, *, loud: bool = True):  # engine: {use: my_package.engines:shouting, loud: true}
  return Shouting()
```
"""

from cqd_jax.genotypes.space import Candidates
from cqd_jax.tasks.episode import Engine, Message, Request

__all__ = ["Candidates", "Engine", "Message", "Request"]
