"""The requests of a benchmark: a photograph of its own, a question and an adapter for each.

Images are crops of the photographs in examples/images; the same round has the same ones always,
and no two requests of any rounds share one, so a cache of an earlier round helps nobody.
"""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from valora_jax.media.chat import render_chat

PHOTOGRAPHS = Path(__file__).parent.parent / "examples" / "images"
QUESTIONS = (
    "What is shown in this picture?",
    "Which colours stand out?",
    "Describe the scene in one short sentence.",
    "Is there an animal in the picture? If so, which one?",
    "Was this taken indoors or outdoors, and how can you tell?",
    "Name three things that you can see.",
    "What is in the background?",
    "Write a caption for this photograph that a newspaper could print.",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request; `image` is a file, `adapter` the name of a loaded one or None."""

    prompt: str
    image: Path
    adapter: str | None

    def as_json(self) -> dict[str, str | None]:
        return {"prompt": self.prompt, "image": str(self.image), "adapter": self.adapter}


def make_round(
    folder: Path, *, model: Path, index: int, count: int, adapters: Sequence[str | None]
) -> list[Request]:
    """Writes the images of round `index` into `folder` and returns its `count` requests.

    Requests take the adapters in turn, and the questions as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    requests = []
    for i in range(count):
        image = folder / f"round{index:02d}_request{i:02d}.png"
        _photograph(random.Random(f"{index}/{i}"), i).save(image, compress_level=1)
        question = QUESTIONS[i % len(QUESTIONS)]
        adapter = adapters[i % len(adapters)]
        requests.append(Request(prompt=_prompt(model, question), image=image, adapter=adapter))
    return requests


def _photograph(rng: random.Random, index: int) -> Image.Image:
    """A crop of half to all of a photograph's width and height, mirrored half the time."""
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))
    with Image.open(files[index % len(files)]) as file:
        whole = file.convert("RGB")
    width = int(whole.width * rng.uniform(0.5, 1))
    height = int(whole.height * rng.uniform(0.5, 1))
    left, top = rng.randint(0, whole.width - width), rng.randint(0, whole.height - height)
    crop = whole.crop((left, top, left + width, top + height))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def _prompt(model: Path, question: str) -> str:
    """The question about one image, through the checkpoint's chat template."""
    config = json.loads((model / "tokenizer_config.json").read_text())
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt, _ = render_chat(
        (model / "chat_template.jinja").read_text(),
        [{"role": "user", "content": content}],
        image_token=config["image_token"],
        special_tokens={k: config[k] for k in ("bos_token", "eos_token") if k in config},
    )
    return prompt
