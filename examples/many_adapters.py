"""Adapters: load, mix in one batch, combine, reload, unload.

    python examples/many_adapters.py [MODEL ADAPTER_FOLDER ADAPTER_FOLDER]

Without arguments the two adapters are random, not trained: they show how adapters are served, not
what one can learn.
"""

import sys
import tempfile
from pathlib import Path

from valora_jax.config import EngineConfig
from valora_jax.demo import ensure_demo_checkpoint
from valora_jax.demo.random_adapter import write_random_adapter
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.errors import AdapterNotFoundError


def main(model=None, *folders, config=None):
    model = model or ensure_demo_checkpoint()
    config = config or EngineConfig(max_requests=4, max_tokens_per_step=64, warm_up=False)
    with tempfile.TemporaryDirectory() as work, Engine(model, config) as engine:
        cars, planes = folders or (
            write_random_adapter(Path(work) / "cars", model=model, rank=8, seed=1),
            write_random_adapter(Path(work) / "planes", model=model, rank=16, seed=2),
        )
        # The reply says what was bound; a folder that does not fit raises and lists every fault.
        for name, folder in (("cars", cars), ("planes", planes)):
            print("loaded", name, "->", engine.load_adapter(name, folder).bound)

        # Each prompt brings its adapter; None is the base model. They share the engine's steps,
        # and pay for their own ranks only.
        params = SamplingParams(temperature=0, max_tokens=12)
        names = [None, "cars", "planes"]
        chats = [[{"role": "user", "content": "Name the capital of France."}]] * 3
        for name, output in zip(names, engine.chat(chats, params, adapter=names), strict=True):
            print(name or "base model", "->", output.outputs[0].text)

        # A weighted sum of loaded adapters is an adapter.
        print(engine.combine_adapters("both", {"cars": 0.5, "planes": 0.5}).source)

        # Loading a name again makes a new version, also while requests run: those that began with
        # the old one finish with it.
        stream = engine.stream(engine.render_chat(chats[0]), params, adapter="cars")
        old = next(stream).adapter
        new = engine.load_adapter("cars", planes).ref
        *_, last = stream
        print(f"began with version {old.version}, ended with {last.adapter.version}; new: {new}")

        engine.unload_adapter("cars")
        print("left:", [info.ref.name for info in engine.list_adapters()])
        try:
            engine.chat(chats[0], params, adapter="cars")
        except AdapterNotFoundError as error:
            print("refused:", error)


if __name__ == "__main__":
    main(*sys.argv[1:4])
