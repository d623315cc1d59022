"""Folders: look inside, convert to Orbax and back, fold an adapter into the weights.

    python examples/convert_and_merge.py [MODEL ADAPTER_FOLDER]

The same as `valora convert inspect | hf-to-orbax | orbax-to-hf | merge`.
"""

import sys
import tempfile
from pathlib import Path

from valora_jax import convert
from valora_jax.config import EngineConfig
from valora_jax.demo import ensure_demo_checkpoint
from valora_jax.demo.random_adapter import write_random_adapter
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams


def main(model=None, adapter=None, config=None):
    model = Path(model or ensure_demo_checkpoint())
    config = config or EngineConfig(max_requests=4, max_tokens_per_step=64, warm_up=False)
    params = SamplingParams(temperature=0, max_tokens=8)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        adapter = adapter or write_random_adapter(work / "adapter", model=model, rank=8, seed=1)
        # What a folder holds, read from its headers; with a model, where an adapter attaches.
        print(convert.inspect_folder(model))
        print(convert.inspect_folder(Path(adapter), model=model).bound)

        # Orbax holds the same numbers; the way back gives the same bits.
        convert.hf_to_orbax(model, work / "orbax", overwrite=False, progress=False)
        convert.orbax_to_hf(work / "orbax", work / "back", overwrite=False, progress=False)

        # W + scale * B A, in float32, rounded once to what the base is stored in.
        parts = [("adapter", Path(adapter), 1.0)]
        combined = convert.read_combination(model, parts, kind="cat")
        convert.merge_adapter(model, combined, work / "merged", overwrite=False)

        with Engine(work / "merged", config) as engine:
            print("merged: ", engine.generate("The sky is", params)[0].outputs[0].text)
        with Engine(work / "back", config) as engine:
            engine.load_adapter("adapter", adapter)
            (output,) = engine.generate("The sky is", params, adapter="adapter")
            print("adapter:", output.outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:3])
