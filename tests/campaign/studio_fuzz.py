"""Hostile values to every endpoint of the studio: a result or a sentence each time, and the studio is as it was."""

import html
import http.client
import json
import math
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from campaign import laws, materials, studio
from campaign.mutations import NUMBERS, STRINGS, Mutations
from campaign.processes import Child

TIMEOUT = 60  # seconds for one answer
MAX_MESSAGE = 3000  # letters
UNEXPECTED = "unexpected happened"  # what the page says of an exception that nobody has thought of
REX, TOM = {"picked": {"rex": 1}}, {"picked": {"tom": 1}}
FILE = "<an uploaded picture>"
STOPS = {"/teach": "/stop_teaching", "/one_lora": "/stop_one_lora"}
LEFTOVERS = (".writing", ".moving", ".reserved")


def endpoints(base: str, pictures: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Values for every endpoint that it takes."""
    drawing = ["a <rex>", "", 0, False, 2, 2.5, 1, "", {"regions": []}, True, "", 0.6, None, "a1111"]
    filled = {"filled": {"max_train_steps": "2", "targets": "unet.attn2.to_k", "text_encoder_lr": "0"}}
    return {
        "/pictures": [[FILE], []], "/start_picture": [FILE], "/draw": [REX, *drawing],
        "/teach": [pictures, "new", "dog", "quick", filled, ""], "/watch": [],
        "/pause_teaching": [], "/stop_teaching": [],
        "/compare": [REX, "a <rex>", "1", ["direct_sum"], False, 0],
        "/fuse": [REX, "direct_sum", "both"], "/export": [REX, "direct_sum", "", "kohya", 0],
        "/bake": [REX, "direct_sum", "baked", True], "/base": [base],
        "/bind": ["rex", "the knight", REX],
        "/one_lora": [REX, "", "quick", 4, ""], "/watch_one_lora": ["ComfyUI"], "/stop_one_lora": [],
        "/library": ["", ""], "/rename": ["rex", "<rex>"], "/delete": ["nothing"], "/import": [FILE],
    }  # fmt: skip


def hostile_values(pictures: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Of every widget of the page, what no page sends."""
    picks: tuple[Any, ...] = (None, [], "rex", 3, {"rex": None}, {"rex": "x"}, {"rex": math.nan}, {"rex": 1e308})
    picks += ({"../rex": 1}, {"rex": [1]}, {"rex": 999}, {"rex": -1e9}, {"\ud800": 1}, {"x" * 5000: 1})
    box: tuple[Any, ...] = ([0, 0], ["x", 0, 1, 1], [math.nan, 0, 1, 1], [1, 1, 0, 0], 5, "0 0 1 1", [1e308] * 4)
    masks: tuple[Any, ...] = (3, "data:image/png;base64,AAAA", "data:image/png;base64,iVBORw0KGgo=", "/etc/passwd")
    regions: tuple[Any, ...] = (None, 3, "abc", [None], [{}], [{"prompt": {"a": 1}, "box": 5}], [{"prompt": "a"}] * 99)
    regions += (*([{"prompt": "a", "box": one}] for one in box), *([{"prompt": "a", "mask": one}] for one in masks))
    settings = {
        "rank": ("many", "99999999999", 3, None, "0"), "resolution": ("80000", "7"), "learning_rate": ("nan", "1e9"),
        "seed": ("-5",), "nothing": ("1",), "slice": ("1000000000", "x"), "targets": ("unet.nowhere", ""),
        "adapter_type": ("x",), "max_train_steps": ("0", "1e3"), "train_batch_size": ("100000000",),
        "num_vectors": ("1000000", "0"), "lr_scheduler": ("x",), "validation_prompt": ("\0", "x" * 20000),
        "output_dir": ("/etc",), "report_to": ("wandb",), "pretrained_model_name_or_path": ("/etc",),
    }  # fmt: skip
    filled: tuple[Any, ...] = (None, [], "x", *({name: text} for name, texts in settings.items() for text in texts))
    uploads: tuple[Any, ...] = ([{"id": "x"}], [{"crop": 1}], [{"id": None, "crop": "x", "caption": 3}], ["a"], [1, 2])
    uploads += ([pictures[0] | {"caption": [1]}], [{"id": {"a": 1}, "name": 3}], pictures * 101, [pictures[0]] * 2)
    paths = ("/etc/passwd", "../../etc/passwd", "", None, 3, "file:///etc/passwd", "http://127.0.0.1:1/x.png", "\0")
    files = ({"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths)
    words = ("x" * 100_000, "<rex> " * 2000, "🦖" * 500, "1e999", "nan", "pocket2", "0.5 1 2 nan", "1 " * 500, "9e9")
    lists: tuple[Any, ...] = ([], {}, [None], [[]], {"a": 1}, ["direct_sum"] * 99, ["dense"], [{"a": 1}], True, False)
    return (
        *({"picked": value} for value in picks), *({"regions": value} for value in regions),
        *({"filled": value} for value in filled), *uploads, *files, *words, *lists, None, *NUMBERS, *STRINGS,
    )  # fmt: skip


class Page:
    """The studio over HTTP, as programs without gradio's client use it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def request(self, method: str, path: str, body: bytes = b"", content: str = "application/json") -> Any:
        """The open response; its connection is closed with it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request(
            method, f"/gradio_api/{path}", body or None, {"Content-Type": content, "Connection": "close"}
        )
        return connection.getresponse()

    def wait(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if self.request("GET", "startup-events").read():
                    return
            except OSError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def upload(self, file: Path) -> dict[str, Any]:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'.encode()
        body = head + file.read_bytes() + b"\r\n--x--\r\n"
        (path,) = json.loads(self.request("POST", "upload", body, "multipart/form-data; boundary=x").read())
        return {"path": path, "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}

    def call(self, endpoint: str, values: list[Any]) -> tuple[str, Any]:
        """ "complete" with the last values, "error" with its sentence, or the status of a refusal and its words."""
        body = json.dumps({"data": values}).encode()
        with self.request("POST", f"call{endpoint}", body) as response:
            text = response.read().decode(errors="replace")
        if response.status != 200:
            return str(response.status), text
        event, answer = "", ("no answer", "")
        with self.request("GET", f"call{endpoint}/{json.loads(text)['event_id']}") as response:
            for line in response:
                name, _, rest = line.decode().strip().partition(": ")
                if name == "event":
                    event = rest
                elif name == "data" and event in ("complete", "error"):
                    answer = event, json.loads(rest)
        return answer


def fuzz(folder: Path, seed: int, count: int) -> tuple[dict[str, int], list[str]]:
    """So many calls, the endpoints in turn. Returns how they ended, and what was wrong."""
    work, base = laws.fresh(folder / "endpoints", folder / "data"), folder / materials.BASE
    shutil.copytree(folder / "lib", work / "out")
    port = studio.free_port()
    child, page = Child(partial(studio.serve, base, studio.wait_for(work / "done"), port), work), Page(port)
    page.wait()
    endings, problems = Counter[str](), list[str]()
    pictures = page.call("/pictures", [[page.upload(file) for file in sorted((work / "data").iterdir())], []])[1][1]
    table, hostile = endpoints(str(base), pictures), hostile_values(pictures)
    before = drawn(page)
    for number in range(count):
        endpoint = list(table)[number % len(table)]
        values = changed(table[endpoint], Mutations(f"{seed} studio {number}"), hostile)
        if endpoint == "/base" and str(*values[:1]).strip().lower() in ("", "pocket", "none"):
            values = ["/nowhere"]  # another base takes its time, and has no use for these concepts
        upload = page.upload(work / "data" / "00.png") if FILE in str(values) else None
        began = time.monotonic()
        try:
            ending, text = page.call(endpoint, [with_file(value, upload) for value in values])
        except (OSError, ValueError, http.client.HTTPException) as error:
            ending, text = "no answer", repr(error)
        endings[ending] += 1
        if problem := wrong(ending, text, time.monotonic() - began):
            problems.append(f"{endpoint} {number}, {str(values)[:300]}: {problem}")
        if endpoint in STOPS:
            page.call(STOPS[endpoint], [])
    problems += [] if drawn(page) == before else ["the same drawing is another one afterwards"]
    problems += [] if "tom" in page.call("/library", ["", ""])[1][0] else ["the library has lost a concept"]
    (work / "done").touch()
    ending = child.wait(60)
    problems += [f"the studio: {ending.code} {ending.last_lines}"] if ending.code else []
    _, error, rest = ending.output.partition("Unexpected error")
    problems += [f"the terminal shows an unexpected error: {rest[:9000]}"] if error else []
    problems += [f"{name} is left over" for name in laws.hidden_files(work) if name.endswith(LEFTOVERS)]
    outside = {path.name for path in work.iterdir()} - {"data", "out", "done"}
    return dict(endings), problems + [f"{name} is written outside the library" for name in sorted(outside)]


def changed(values: list[Any], mutations: Mutations, hostile: tuple[Any, ...]) -> list[Any]:
    """One or two of the values replaced or changed; now and then too few or too many."""
    values = list(values)
    for _ in range(mutations.random.choice((1, 1, 2)) if values else 0):
        place = mutations.random.randrange(len(values))
        value = values[place] if mutations.chance(0.25) else mutations.random.choice(hostile)
        values[place] = mutations.changed(value, 0.3) if mutations.chance(0.25) else value
    if mutations.chance(0.03):
        values = values[:-1] if values and mutations.chance(0.5) else [*values, mutations.value()]
    return values


def with_file(value: Any, upload: dict[str, Any] | None) -> Any:
    """`FILE` as the file that was sent for it."""
    return (
        [with_file(part, upload) for part in value] if isinstance(value, list) else upload if value == FILE else value
    )


def wrong(ending: str, text: Any, seconds: float) -> str:
    """What is wrong with an answer; empty for a result or a sentence. What gradio itself refuses has its words."""
    message = html.unescape(str((text or {}).get("error") or "") if isinstance(text, dict) else str(text))
    if ending == "complete":
        return ""
    conditions = {
        "no answer": ending != "no answer",
        f"{seconds:.0f} s": seconds < TIMEOUT,
        "an unexpected error": UNEXPECTED not in message,
        f"a message of {len(message)} letters": len(message) < MAX_MESSAGE or message.startswith("Value: "),
        "a traceback": "Traceback" not in message,
    }
    return "; ".join(problem for problem, holds in conditions.items() if not holds) and f"{ending}: {message[:300]}"


def drawn(page: Page) -> bytes:
    """What one recipe gives, as a file that the page serves."""
    values = [TOM, "a <tom>", "", 5, False, 2, 2.5, 1, "", {"regions": []}, True, "", 0.6, None, "a1111"]
    ending, answer = page.call("/draw", values)
    assert ending == "complete", answer
    return page.request("GET", f"file={answer[0]['path']}").read()
