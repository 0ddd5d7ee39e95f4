"""The example workflow in a real server of ComfyUI, started as people start it, with the folder in custom_nodes."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

import fusion
from fusion.comfyui.node_folder import write_node_folder
from trained import everywhere, trained_adapter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
PATIENCE = 600  # seconds, on a busy machine
# In place of a checkpoint: the toy of tests/comfy_toys.py, and a decoder that shows its latent.
TOY_NODE = """
import sys
sys.path.append({tests!r})
import torch

class Decoder:
    def decode(self, latent):
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8.0).sigmoid().movedim(1, -1)

class ToyCheckpoint:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "load", "loaders"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{}}}}

    def load(self):
        from comfy_toys import Toy

        with torch.inference_mode(False):
            toy = Toy("sd1")
        return toy.model, toy.clip, Decoder()

NODE_CLASS_MAPPINGS = {{"ToyCheckpoint": ToyCheckpoint}}
"""


@contextmanager
def server(base):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (base / "web").mkdir()
    options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    options += ["--front-end-root", str(base / "web"), "--disable-auto-launch", "--disable-api-nodes"]
    command = [sys.executable, "main.py", *options, "--database-url", "sqlite:///:memory:"]
    with (base / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=os.environ["COMFYUI_DIR"], stdout=log, stderr=log)
        try:
            yield lambda path, data=None: answer(process, f"http://127.0.0.1:{port}{path}", data)
        finally:
            process.terminate()
            process.wait(30)


def answer(process, address, data):
    """The JSON of an address, as soon as the server answers."""
    end = time.monotonic() + PATIENCE
    while True:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            pytest.fail(error.read().decode())
        except OSError:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.5)


def as_prompt(workflow, nodes):
    """The API's form of a workflow: every input by its name; `nodes` is what the server says of its nodes."""
    links = {number: [str(source), output] for number, source, output, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        inputs = {slot["name"]: links[slot["link"]] for slot in node.get("inputs", ())}
        values = iter(node["widgets_values"])
        for name, (_, *options) in nodes[node["type"]]["input"]["required"].items():
            if name not in inputs:
                inputs[name] = next(values)
                if options and options[0].get("control_after_generate"):
                    next(values)  # what the page does to the seed afterwards
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def test_the_example_runs_to_a_saved_picture(toys, tmp_path):
    toy = toys("sd1")
    models = tmp_path / "models"
    for folder in ("spectral_adapters", "loras", "checkpoints"):
        (models / folder).mkdir(parents=True)
    fusion.save(trained_adapter(toy.pipe, "<dog>", scale=0.1), models / "spectral_adapters" / "dog.safetensors")
    knight = trained_adapter(toy.pipe, "<x>", kind="lora", k=1, gated=False, targets=everywhere(toy.pipe), scale=0.1)
    fusion.export(knight, models / "loras" / "knight.safetensors", "kohya")
    (models / "checkpoints" / "v1-5-pruned-emaonly.safetensors").touch()
    folder = write_node_folder(tmp_path / "custom_nodes" / "comfyui-spectral-fusion")
    (tmp_path / "custom_nodes" / "toy.py").write_text(TOY_NODE.format(tests=str(Path(__file__).parents[1])))
    with server(tmp_path) as ask:
        nodes = ask("/object_info")
        assert {"LoadSpectralAdapter", "BindLoraToWord", "ConceptMasks", "AdapterCompatibility"} <= nodes.keys()
        prompt = as_prompt(json.loads((folder / "example_workflows" / "spectral_adapter.json").read_text()), nodes)
        prompt["1"] = {"class_type": "ToyCheckpoint", "inputs": {}}
        prompt["6"]["inputs"] |= {"width": 64, "height": 64}
        for number in ("7", "10"):
            prompt[number]["inputs"]["steps"] = 4
        number = ask("/prompt", {"prompt": prompt})["prompt_id"]
        end = time.monotonic() + PATIENCE
        while not (history := ask(f"/history/{number}")) and time.monotonic() < end:
            time.sleep(0.5)
    entry = history[number]
    assert entry["status"]["status_str"] == "success", entry["status"]
    (picture,) = entry["outputs"]["9"]["images"]
    with Image.open(tmp_path / "output" / picture["filename"]) as image:
        assert image.size == (64, 64)
    report = entry["outputs"]["17"]["text"]
    assert report == entry["outputs"]["18"]["text"] and "knight, dog: cosine" in report[0]
