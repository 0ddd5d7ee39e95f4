"""The app on a toy base in a folder, with pictures of noise to learn from."""

import numpy as np
import pytest
from PIL import Image

import tiny
from fusion_studio.session import Session
from fusion_studio.tabs import teach

SETTINGS = """
[training]
rank = 4
max_train_steps = 4
learning_rate = 1e-2
token_lr = 1e-2
train_batch_size = 2

[generation]
steps = 3
guidance_scale = 2.5
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny-sd1"
    tiny.pipeline("sd1").save_pretrained(folder)
    (folder / "fusion.toml").write_text(SETTINGS)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    """Uploads as gradio hands them over: paths."""
    noise = np.random.default_rng(0)
    made = []
    for name in ("one.png", "Zwei & Ümlaut (2).jpg", "three.webp"):
        path = tmp_path / "uploads" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
        made.append(str(path))
    return made


@pytest.fixture
def session(base, tmp_path):
    return Session(base, tmp_path / "library")


@pytest.fixture
def taught(session, files):
    """Teach to the end; the last view of it."""

    def teach_it(token, steps=2, noun="dog", **settings):
        _, pictures, _ = teach.add_pictures(session, files)
        filled = {"max_train_steps": str(steps), **settings}
        teach.teach_concept(session, pictures, token, noun, "standard", {"filled": filled})
        *_, last = teach.watch(session)
        return last

    return teach_it
