import json
import pathlib
import shutil

import pytest

from valora_jax.media import Tokenizer

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
CHECKPOINT = GOLDENS / "checkpoints" / "llava15-tiny"
CASES = json.loads((GOLDENS / "text" / "text_cases.json").read_text("utf-8"))["tokenizer"]
TOKENIZER = Tokenizer.from_folder(CHECKPOINT)


@pytest.fixture
def folder(tmp_path):
    """A copy of the tokenizer's files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    return tmp_path


def change(path: pathlib.Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["text"] is not None], ids=lambda c: c["text"]
)
def test_ids_match_the_golden(case):
    assert TOKENIZER.encode(case["text"]) == case["ids"]
    assert TOKENIZER.encode(case["text"], add_special_tokens=False) == case["ids_no_special"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["decoded"])
def test_texts_match_the_golden(case):
    assert TOKENIZER.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
    assert TOKENIZER.decode(case["ids"]) == case["decoded_skip_special"]


def test_special_tokens_have_ids_and_texts():
    ids = (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert ids == (1, 2, 673)
    assert TOKENIZER.special_tokens["image_token"] == "<image>"
    assert TOKENIZER.special_ids == {0, 1, 2, 672, 673}
    assert TOKENIZER.vocab_size == 674
    assert TOKENIZER.token_text(13) == "<0x0A>"
    assert TOKENIZER.token_text(674) is None
    assert TOKENIZER.token_id("<image>") == 672


def test_stop_ids_come_from_the_first_config_that_has_them(folder):
    assert Tokenizer.from_folder(folder).stop_token_ids == (2,)
    change(folder / "generation_config.json", eos_token_id=[13, 2])
    assert Tokenizer.from_folder(folder).stop_token_ids == (2, 13)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    assert Tokenizer.from_folder(folder).stop_token_ids == (7,)
    (folder / "config.json").unlink()
    assert Tokenizer.from_folder(folder).stop_token_ids == (2,)


def test_the_chat_template_is_found_in_each_of_its_places(folder):
    assert Tokenizer.from_folder(folder).chat_template is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.from_folder(folder).chat_template == "list"
    change(folder / "tokenizer_config.json", chat_template="config")
    assert Tokenizer.from_folder(folder).chat_template == "config"
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_folder(folder).chat_template == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_folder(folder).chat_template == "jinja"


def test_a_llama_tokenizer_that_is_not_legacy_gives_transformers_ids(folder):
    from transformers import AutoTokenizer  # slow to import

    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=False)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    texts = [case["text"] for case in CASES if case["text"] is not None]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert ours.encode("<image> x") != TOKENIZER.encode("<image> x")


def test_any_other_llama_tokenizer_follows_its_file(folder):
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=True)
    assert Tokenizer.from_folder(folder).encode("<image> x") == TOKENIZER.encode("<image> x")


def test_special_tokens_may_be_written_with_all_their_fields(folder):
    change(folder / "tokenizer_config.json", eos_token={"content": "</s>", "lstrip": False})
    assert Tokenizer.from_folder(folder).eos_token_id == 2


def test_truncation_and_padding_of_the_file_are_not_applied(folder):
    settings = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    change(folder / "tokenizer.json", truncation=settings)
    assert len(Tokenizer.from_folder(folder).encode("Hello world")) == 8


def test_a_broken_folder_is_refused_by_file(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(folder)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(folder / "nowhere")


def test_a_text_with_lone_surrogates_is_refused():
    with pytest.raises(ValueError, match="Unicode"):
        TOKENIZER.encode("a\ud800b")
