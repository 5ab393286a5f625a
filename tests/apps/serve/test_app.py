"""The application without a server, with the tiny model."""

import asyncio
import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from openapi_spec_validator import validate

import contracap
from contracap.apps.serve.app import build_app
from contracap.apps.serve.batching import BatchingConfig
from contracap.apps.serve.config import AccessConfig, LimitsConfig
from contracap.apps.serve.model import ServedModel
from contracap.apps.serve.service import DefaultStrategy
from contracap.evaluation.zeroshot import build_classifier
from contracap.generation import BeamSearch, Captioner, Greedy, Sampling
from contracap.model.coca import CoCa
from contracap.model.pooler import PoolerConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model
from contracap.processor import Processor

from .pictures import BAD, COLOURS, picture, png

Client = httpx.AsyncClient


@pytest.fixture(scope="module")
def pair() -> tuple[CoCa, Processor]:
    """A tiny model, changed so that it writes different things about different colours."""
    model, processor = contracap.load("tiny", weights="random", seed=0)
    assert model.decoder is not None
    with torch.no_grad():
        model.decoder.vocabulary.weight *= 2.0
        for name, weight in model.decoder.cross_blocks.named_parameters():
            if name.endswith("attention.out.weight"):
                weight *= 20.0
    return model, processor


def application(
    pair: tuple[CoCa, Processor],
    *,
    wait: float = 5.0,
    batch: int = 16,
    access: AccessConfig | None = None,
    **limits: Any,
) -> FastAPI:
    batching = BatchingConfig(max_batch=batch, max_wait_ms=wait)
    limited = LimitsConfig(**limits)
    return build_app(
        *pair, default=DefaultStrategy(), batching=batching, limits=limited, access=access or AccessConfig()
    )


def asked(app: FastAPI, test: Callable[[Client], Awaitable[None]]) -> None:
    """Run a test with a client of the running application."""

    async def run() -> None:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), Client(transport=transport, base_url="http://server") as client:
            await asyncio.wait_for(test(client), 60)

    asyncio.run(run())


def one_line(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"] and len(response.text.splitlines()) == 1
    assert "Traceback" not in response.text
    for word in words:
        assert word in response.json()["error"]


@pytest.fixture
def slow_model(pair) -> Any:
    """The model waits at each image until it may go on."""
    go_on = threading.Event()

    def wait(*_: Any) -> None:
        assert go_on.wait(20)

    hook = pair[0].vision.register_forward_pre_hook(wait)
    yield go_on
    go_on.set()
    hook.remove()


def test_captions_equal_those_of_each_image_alone_whatever_they_share_a_batch_with(pair):
    captioner = Captioner(*pair)
    asks = {
        "?max_tokens=8": BeamSearch(max_tokens=8),
        "?strategy=greedy&max_tokens=8": Greedy(8),
        "?strategy=beam&width=3&length_penalty=-1.5&max_tokens=9": BeamSearch(3, 9, length_penalty=-1.5),
        "?strategy=sample&seed=3&samples=2&max_tokens=9": Sampling(seed=3, samples=2, max_tokens=9),
    }
    requests = [(colour, query) for colour in COLOURS[:3] for query in asks]
    random.Random(0).shuffle(requests)

    async def test(client: Client) -> None:
        answers = await asyncio.gather(
            *(client.post(f"/v1/caption{query}", content=picture(colour)) for colour, query in requests)
        )
        for (colour, query), answer in zip(requests, answers, strict=True):
            (alone,) = captioner([picture(colour)], asks[query])
            made = answer.json()
            assert made["caption"] == alone.text
            assert made["score"] == pytest.approx(alone.score, rel=1e-4)
            assert made["log_probability"] == pytest.approx(alone.log_probability, rel=1e-4)
            assert [text["caption"] for text in made["alternatives"]] == [text.text for text in alone.alternatives]
        assert len({answer.json()["caption"] for answer in answers}) > 3, "the model should look at the images"
        assert figures(await client.get("/metrics"))["contracap_batch_size_count"] <= len(requests) / 2

    asked(application(pair, wait=50.0), test)


def test_a_request_may_say_how_the_caption_begins_and_ask_for_the_embedding(pair):
    captioner, prompts = Captioner(*pair), ["", "a photo", "the red one"]

    async def test(client: Client) -> None:
        query = {"strategy": "greedy", "max_tokens": "12", "embedding": "true"}
        calls = [
            client.post("/v1/caption", params=query | {"prompt": words}, content=picture("red")) for words in prompts
        ]
        for words, answer in zip(prompts, await asyncio.gather(*calls), strict=True):
            (alone,) = captioner([picture("red")], Greedy(12), prompts=words)
            assert answer.json()["caption"] == alone.text and alone.text.startswith(words)
            assert answer.json()["embedding"] == pytest.approx(alone.embedding.tolist(), abs=1e-5)
        plain = await client.post("/v1/caption?strategy=greedy&max_tokens=12", content=picture("red"))
        assert plain.json()["embedding"] is None
        long = await client.post("/v1/caption", params={"prompt": "a " * 40}, content=picture("red"))
        one_line(long, 400, "nothing can follow")

    asked(application(pair, wait=50.0), test)


def test_embeddings_and_labels_are_the_models(pair):
    model, processor = pair
    pixels, labels = processor.images([picture(colour) for colour in COLOURS]), ["a cat", "a dog", "a cow"]
    with torch.no_grad():
        images, texts = model.encode_image(pixels), model.encode_text(processor.texts(labels))
        weights = build_classifier(model, processor, labels, ["one {}"])

    async def test(client: Client) -> None:
        answers = await asyncio.gather(*(client.post("/v1/embed/image", content=picture(colour)) for colour in COLOURS))
        made = torch.tensor([answer.json()["embedding"] for answer in answers])
        torch.testing.assert_close(made, images)
        answer = await client.post("/v1/embed/text", json={"texts": labels})
        torch.testing.assert_close(torch.tensor(answer.json()["embeddings"]), texts)
        answer = await client.post(
            "/v1/classify", params={"label": labels, "template": "one {}"}, content=picture("red")
        )
        found = answer.json()["labels"]
        cosines = dict(zip(labels, (images[0] @ weights.T).tolist(), strict=True))
        assert [row["label"] for row in found] == sorted(labels, key=lambda label: -cosines[label])
        assert [row["similarity"] for row in found] == pytest.approx([cosines[row["label"]] for row in found], abs=1e-5)
        assert sum(row["probability"] for row in found) == pytest.approx(1, abs=1e-5)
        ratio = (model.logit_scale.detach().exp() * (found[0]["similarity"] - found[1]["similarity"])).exp().item()
        assert found[0]["probability"] / found[1]["probability"] == pytest.approx(ratio, rel=1e-3)

    asked(application(pair), test)


def test_a_bad_image_gets_one_line_and_leaves_the_others_of_its_batch_alone(pair):
    async def test(client: Client) -> None:
        files = [*BAD.values(), picture("red"), picture("blue", "JPEG")]
        for route in ("/v1/caption?strategy=greedy&max_tokens=6", "/v1/embed/image", "/v1/classify?label=a"):
            answers = await asyncio.gather(*(client.post(route, content=file) for file in files))
            for name, answer in zip(BAD, answers, strict=False):
                one_line(answer, 400, "image")
                assert answer.json()["error"], name
            assert [answer.status_code for answer in answers[-2:]] == [200, 200]

    asked(application(pair, wait=20.0), test)


def test_a_wrong_strategy_or_setting_gets_one_line_that_says_what_would_do(pair):
    long = "a very long phrase that no context of this small model can hold at all, however"
    wrong = {
        "strategy=bean": ("unknown strategy 'bean'", "beam"),
        "widht=3": ("unknown key 'widht'", "'width'"),
        "width=many": ("width", "integer"),
        "width=33": ("33", "32 allowed"),
        "width=1000000000000000000000": ("width",),
        "min_tokens=20&max_tokens=10": ("min_tokens", "20", "10"),
        "min_tokens=20&max_tokens=25": ("min_tokens", "20", "16"),
        "width=" + "[" * 5000: (),
        "strategy=sample&samples=33": ("33", "32 allowed"),
        "strategy=rerank&of.samples=33": ("33", "32 allowed"),
        'rules.banned=["red"]&rules.forced=["red"]': ("red",),
        f'rules.forced=["{long}"]': ("room",),
        "length_penalty=nan": ("length_penalty",),
        "=3": ("=3",),
        "width=2&width=3": ("width",),
    }

    async def test(client: Client) -> None:
        for query, words in wrong.items():
            one_line(await client.post(f"/v1/caption?{query}", content=picture("red")), 400, *words)

    asked(application(pair), test)


def test_other_wrong_requests_get_the_same_shape_of_error(pair):
    async def test(client: Client) -> None:
        one_line(await client.post("/v1/caption", data={"strategy": "beam"}, files={"a": b""}), 400, "-F image=@a.jpg")
        many = [("image", picture("red"))] * 17
        one_line(await client.post("/v1/caption", files=many), 400, "16")
        one_line(await client.post("/v1/classify", content=picture("red")), 400, "label")
        for query, named in {
            "label=a&template=b": "{}",
            "label=&label=cat": "label",
            "label=cat&label=cat": "label",
            "label=cat&template={}&template=a {}": "template",
        }.items():
            one_line(await client.post(f"/v1/classify?{query}", content=picture("red")), 400, named)
        one_line(await client.post("/v1/classify", params={"label": ["a"] * 101}, content=picture("red")), 400, "100")
        one_line(await client.post("/v1/embed/text", json={"texts": []}), 400, "texts")
        one_line(await client.post("/v1/embed/text", json={"texts": ["a"] * 257}), 400, "256")
        one_line(await client.post("/v1/embed/text", json={"texts": ["a" * 5000]}), 400, "4096")
        one_line(await client.post("/v1/embed/text", json={"texts": [3]}), 400, "texts")
        for content in (b'{"texts"', b"[" * 100_000, b"\xff\xfe", b'{"texts": ["\\ud800"]}', b"texts=a"):
            for kind in ("application/json", "text/plain"):
                answer = await client.post("/v1/embed/text", content=content, headers={"Content-Type": kind})
                one_line(answer, 400)
        one_line(await client.get("/v1/caption"), 405)

    asked(application(pair), test)


def test_a_model_without_a_decoder_embeds_and_classifies_and_says_that_it_cannot_caption():
    async def test(client: Client) -> None:
        one_line(await client.post("/v1/caption", content=picture("red")), 501, "no text decoder")
        for route in ("/v1/embed/image", "/v1/classify?label=a&label=b"):
            assert (await client.post(route, content=picture("red"))).status_code == 200

    pooler, text = PoolerConfig(kind="class_token", queries=0), replace(SIZES["tiny"].text, pool="end_token")
    clip = replace(SIZES["tiny"], pooler=pooler, text=text, decoder=None)
    asked(application(random_model(clip, seed=0)), test)


async def pieces(size: int, count: int, read: list[int], seconds: float = 0.0) -> AsyncIterator[bytes]:
    """A body without a length; notes what was asked of it."""
    for _ in range(count):
        await asyncio.sleep(seconds)
        read.append(size)
        yield bytes(size)


def test_a_body_above_the_limit_is_refused_before_it_is_read(pair):
    async def test(client: Client) -> None:
        read: list[int] = []
        one_line(await client.post("/v1/caption", content=pieces(2**16, 3200, read)), 413, "0.5 MiB")
        assert sum(read) <= 2**19 + 2**16
        read.clear()
        said = {"Content-Length": str(200 * 2**20)}
        one_line(await client.post("/v1/caption", content=pieces(2**16, 3200, read), headers=said), 413, "0.5 MiB")
        assert not read
        lie = {"Content-Length": "10"}
        one_line(await client.post("/v1/caption", content=pieces(2**16, 3200, read), headers=lie), 413, "0.5 MiB")
        endless = {"Content-Length": "9" * 5000}
        one_line(await client.post("/v1/caption", content=pieces(1, 1, read), headers=endless), 413)
        assert (await client.post("/v1/caption", content=picture("red"))).status_code == 200

    asked(application(pair, max_body_mib=0.5), test)


def test_a_slow_upload_is_told_so(pair):
    async def test(client: Client) -> None:
        one_line(await client.post("/v1/caption", content=pieces(1, 100, [], seconds=0.1)), 408, "0.2 seconds")

    asked(application(pair, timeout_s=0.2), test)


def test_a_slow_answer_is_given_up_and_its_request_leaves_the_queue(pair, slow_model):
    async def test(client: Client) -> None:
        answers = await asyncio.gather(*(client.post("/v1/caption", content=picture("red")) for _ in range(3)))
        for answer in answers:
            one_line(answer, 504, "1 seconds")
        now = figures(await client.get("/metrics"))
        assert now["contracap_queue_length"] == now["contracap_requests_under_way"] == 0
        assert now['contracap_requests_total{route="/v1/caption",status="504"}'] == 3
        assert now["contracap_batch_size_sum"] == 1, "the two behind it never reached the model"
        slow_model.set()
        assert (await client.post("/v1/embed/image", content=picture("red"))).status_code == 200

    asked(application(pair, batch=1, timeout_s=1.0), test)


def test_requests_above_the_limit_are_told_to_come_again(pair, slow_model):
    async def test(client: Client) -> None:
        first = [asyncio.create_task(client.post("/v1/caption", content=picture(colour))) for colour in COLOURS[:2]]
        await until(client, "contracap_requests_under_way", 2)
        answer = await client.post("/v1/caption", content=picture("red"))
        one_line(answer, 503, "(2)", "again")
        assert answer.headers["retry-after"] == "1"
        one_line(await client.get("/ready"), 503, "(2)")
        assert (await client.get("/health")).json() == {"status": "alive"}
        slow_model.set()
        assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]
        assert (await client.get("/ready")).json() == {"status": "ready"}

    asked(application(pair, max_requests=2), test)


def test_a_request_whose_client_goes_leaves_the_queue(pair, slow_model):
    app = application(pair, batch=1)

    async def test(client: Client) -> None:
        first = asyncio.create_task(client.post("/v1/caption", content=picture("red")))
        leave, sent = asyncio.Event(), []
        messages = iter([{"type": "http.request", "body": picture("blue"), "more_body": False}])

        async def receive() -> dict[str, Any]:
            if message := next(messages, None):
                return message
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/caption", "query_string": b"", "headers": []}
        await until(client, "contracap_batch_size_count", 1)
        call = asyncio.create_task(app(scope, receive, send))
        await until(client, "contracap_queue_length", 1)
        leave.set()
        await asyncio.wait_for(call, 5)
        assert not sent
        now = figures(await client.get("/metrics"))
        assert (now["contracap_queue_length"], now["contracap_requests_under_way"]) == (0, 1)
        assert now['contracap_requests_total{route="/v1/caption",status="499"}'] == 1
        slow_model.set()
        assert (await first).status_code == 200

    asked(app, test)


def test_a_model_that_fails_gets_one_line_and_the_reason_is_in_the_log_only(pair, caplog):
    def fail(*_: Any) -> None:
        raise RuntimeError("secret of the machine room")

    hook = pair[0].vision.register_forward_pre_hook(fail)

    async def test(client: Client) -> None:
        answer = await client.post("/v1/caption", content=picture("red"))
        one_line(answer, 500, "log")
        assert "secret" not in answer.text
        hook.remove()
        assert (await client.post("/v1/caption", content=picture("red"))).status_code == 200

    with caplog.at_level(logging.ERROR):
        asked(application(pair), test)
    assert "secret of the machine room" in caplog.text


def test_weights_that_are_broken_give_errors_not_captions(caplog):
    model, processor = contracap.load("tiny", weights="random", seed=0)
    with torch.no_grad():
        for weight in model.vision.parameters():
            weight.fill_(float("nan"))

    async def test(client: Client) -> None:
        for route in ("/v1/caption", "/v1/embed/image", "/v1/classify?label=a"):
            one_line(await client.post(route, content=picture("red")), 500)

    asked(application((model, processor)), test)
    assert "not finite" in caplog.text


def figures(response: httpx.Response) -> dict[str, float]:
    """The samples of Prometheus' text format; every other line must be a comment of it."""
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert response.text.endswith("\n")
    samples = {}
    for line in response.text.splitlines():
        if not re.fullmatch(r"# (HELP \w+ .+|TYPE \w+ (counter|gauge|histogram))", line):
            sample = re.fullmatch(r'(\w+(?:\{\w+="[^"\\]*"(?:,\w+="[^"\\]*")*\})?) (\S+)', line)
            assert sample, line
            samples[sample[1]] = float(sample[2])
    return samples


async def until(client: Client, name: str, least: int) -> None:
    """Returns once a figure of the metrics is so large."""
    async with asyncio.timeout(20):
        while figures(await client.get("/metrics"))[name] < least:
            await asyncio.sleep(0.01)


def test_metrics_count_requests_by_route_and_status_and_made_up_paths_together(pair):
    async def test(client: Client) -> None:
        await client.post("/v1/caption", content=picture("red"))
        await client.post("/v1/caption", content=b"")
        for path in ("/a", "/b", '/"} 1'):
            await client.get(path)
        now = figures(await client.get("/metrics"))
        assert now['contracap_requests_total{route="/v1/caption",status="200"}'] == 1
        assert now['contracap_requests_total{route="/v1/caption",status="400"}'] == 1
        assert now['contracap_requests_total{route="other",status="404"}'] == 3
        assert now['contracap_request_seconds_count{route="/v1/caption"}'] == 2
        assert now['contracap_request_seconds_sum{route="/v1/caption"}'] > 0
        assert now['contracap_request_seconds_bucket{le="+Inf",route="/v1/caption"}'] == 2
        assert now['contracap_batch_size_bucket{le="1.0"}'] == now["contracap_batch_size_sum"] == 1

    asked(application(pair), test)


def test_openapi_is_valid_and_the_pages_ask_the_network_for_nothing(pair):
    async def test(client: Client) -> None:
        description = (await client.get("/openapi.json")).json()
        validate(description)
        page = (await client.get("/")).text
        assert all(path in page for path in description["paths"])
        assert not re.search(r"(src|href|url)\s*[=(]", page)
        swagger = (await client.get("/docs")).text
        assert "swagger" in swagger and "://" not in swagger
        for path in re.findall(r"""(?:src|href)=["']([^"']+)""", swagger):
            assert (await client.get(path)).status_code == 200, path

    asked(application(pair), test)


def test_no_request_however_odd_makes_the_server_fail(pair):
    chance = random.Random(0)
    words = ["strategy", "beam", "greedy", "sample", "legacy", "rerank", "width", "max_tokens", "min_tokens", "samples"]
    words += ["of.samples", "top_p", "rules", "rules.banned", "rules.forced", "label", "template", "texts", "a.b.c"]
    words += ["true", "nan", "3", "-1", "0.5", "1e9", "{}", "[]", "['a']", "{", "'", '"', "\\", "", " "]
    words += ["%00", "%ff", "%F0%9F%98%80"]
    good = picture("red", "JPEG")

    def body() -> bytes:
        cut = bytearray(good[: chance.randrange(len(good))] if chance.random() < 0.5 else good)
        for _ in range(chance.randrange(20)):
            cut[chance.randrange(len(cut)) :][:1] = bytes([chance.randrange(256)])
        return bytes(cut) if chance.random() < 0.8 else chance.randbytes(chance.randrange(300))

    async def test(client: Client) -> None:
        for _ in range(100):
            route = chance.choice(["/v1/caption", "/v1/classify", "/v1/embed/image", "/v1/embed/text"])
            pairs = (f"{chance.choice(words)}={chance.choice(words)}" for _ in range(chance.randrange(4)))
            kind = chance.choice(["image/jpeg", "application/json", "multipart/form-data; boundary=x", "", "\x7f"])
            url = f"{route}?{'&'.join(pairs)}"
            answer = await client.request(
                chance.choice(["POST", "POST", "POST", "PUT", "GET"]),
                url,
                content=body(),
                headers={"Content-Type": kind},
            )
            assert answer.status_code < 500, (url, answer.text)
            if answer.status_code != 200:
                one_line(answer, answer.status_code)

    asked(application(pair, wait=0.0), test)


def test_settings_without_a_strategy_change_the_default_and_those_with_one_do_not():
    default = DefaultStrategy("beam", ("width=3", "max_tokens=9"))
    assert default.strategy({}) == BeamSearch(3, 9)
    assert default.strategy({"width": "2"}) == BeamSearch(2, 9)
    assert default.strategy({"strategy": "beam", "width": "2"}) == BeamSearch(2)
    assert default.strategy({"strategy": "greedy"}) == Greedy()


def test_a_form_of_several_images_gets_the_answer_of_each_in_their_order(pair):
    files = [picture("red"), BAD["truncated PNG"], picture("blue", "JPEG")]

    async def test(client: Client) -> None:
        for route in ("/v1/caption?strategy=greedy&embedding=true", "/v1/classify?label=a&label=b", "/v1/embed/image"):
            form = [("image", (f"{number}.png", file)) for number, file in enumerate(files)]
            answers = (await client.post(route, files=form)).json()["answers"]
            alone = [await client.post(route, content=file) for file in files]
            assert answers[1] == alone[1].json() and list(answers[1]) == ["error"]
            for made, expected in ((answers[0], alone[0].json()), (answers[2], alone[2].json())):
                assert made.keys() == expected.keys()
                assert made.get("caption") == expected.get("caption")
                if "embedding" in made:
                    assert made["embedding"] == pytest.approx(expected["embedding"], abs=1e-5)

    asked(application(pair, wait=20.0), test)


def test_what_a_small_request_would_grow_to_is_counted_before_it_is_made(pair):
    async def test(client: Client) -> None:
        labels = [f"{number} " + "a" * 100 for number in range(100)]
        for template in ("{}" * 1000, "{}" + "a" * 1000):
            answer = await client.post("/v1/classify", params={"label": labels, "template": template}, content=b"")
            one_line(answer, 400, "characters", "65536")
        one_line(await client.post("/v1/embed/text", json={"texts": ["a" * 4000] * 20}), 400, "65536")
        words = {"strategy": "greedy", "rules.banned": str(["a"] * 1000)}
        one_line(await client.post("/v1/caption", params=words, content=picture("red")), 400, "4096")
        for body in (b'{"texts": ["' + b"a" * 19_000_000 + b'"]}', b"[3," * 6_000_000):
            answer = await client.post("/v1/embed/text", content=body, headers={"Content-Type": "application/json"})
            one_line(answer, 413, "1 MiB")

    asked(application(pair), test)


def test_bodies_under_way_have_a_limit_together(pair):
    async def test(client: Client) -> None:
        waiting = asyncio.Barrier(30)

        async def halves() -> AsyncIterator[bytes]:
            yield bytes(10_000)
            await waiting.wait()  # until the first half of each has come, for which there is room
            yield bytes(10_000)

        answers = await asyncio.gather(*(client.post("/v1/caption", content=halves()) for _ in range(30)))
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {400, 503} and statuses[400] >= 2  # the others find room as those end
        assert all("MiB" in answer.json()["error"] for answer in answers if answer.status_code == 503)
        assert (await client.post("/v1/caption", content=picture("red"))).status_code == 200

    asked(application(pair, max_body_mib=20_000 / 2**20), test)


def test_large_images_are_decoded_one_at_a_time_and_hold_up_no_small_ones(pair, monkeypatch):
    now, most, go_on = [], [], threading.Event()
    plain = ServedModel.read_image

    def noted(self: ServedModel, data: bytes) -> Any:
        if data != small:
            now.append(data)
            most.append(len(now))
            assert go_on.wait(10)
            now.remove(data)
        return plain(self, data)

    monkeypatch.setattr(ServedModel, "read_image", noted)
    small, large = picture("red"), png(4100, rows=bytes(4100 * 514))

    async def test(client: Client) -> None:
        first = [asyncio.create_task(client.post("/v1/embed/image", content=large)) for _ in range(5)]
        async with asyncio.timeout(20):
            while not now:
                await asyncio.sleep(0.01)
        assert (await client.post("/v1/embed/image", content=small)).status_code == 200
        go_on.set()
        assert {answer.status_code for answer in await asyncio.gather(*first)} == {200}
        assert max(most) == 1

    asked(application(pair), test)


def test_an_honest_request_is_answered_before_a_heavy_one_and_an_abandoned_one_ends(pair):
    decoder = pair[0].decoder
    hook = decoder.register_forward_hook(lambda *_: time.sleep(0.05))
    heavy = "/v1/caption?width=32&min_tokens=15"

    async def test(client: Client) -> None:
        first = [asyncio.create_task(client.post(heavy, content=picture("red"))) for _ in range(3)]
        await until(client, "contracap_batch_size_count", 1)
        assert (await client.post("/v1/embed/image", content=picture("red"))).status_code == 200
        assert not any(task.done() for task in first)
        for task in first[1:]:
            task.cancel()
        assert (await first[0]).status_code == 200

    try:
        asked(application(pair), test)
    finally:
        hook.remove()


def test_a_key_is_wanted_before_a_body_is_read_and_the_schema_says_where(pair):
    async def test(client: Client) -> None:
        read: list[int] = []
        for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
            answer = await client.post("/v1/caption", content=pieces(9, 9, read), headers=header)
            one_line(answer, 401, "Authorization: Bearer")
        assert not read
        key = {"Authorization": "bearer s3cret"}  # RFC 9110: the scheme in any case
        assert (await client.post("/v1/embed/image", content=picture("red"), headers=key)).status_code == 200
        for route in ("/health", "/ready"):
            assert (await client.head(route)).status_code == (await client.get(route)).status_code == 200
        paths = (await client.get("/openapi.json")).json()["paths"]
        with_key = {path for path, methods in paths.items() if any("security" in each for each in methods.values())}
        assert with_key == {path for path in paths if path.startswith("/v1/")} and with_key

    asked(application(pair, access=AccessConfig(api_key="s3cret")), test)


def test_scripts_of_named_pages_alone_may_read_answers(pair):
    async def test(client: Client) -> None:
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            headers = {"Access-Control-Request-Headers": "authorization, content-type"}
            asks = {"Origin": origin, "Access-Control-Request-Method": "POST", **headers}
            before = await client.options("/v1/caption", headers=asks)
            assert before.status_code == (200 if allowed else 400), before.text
            if allowed:
                assert "POST" in before.headers["access-control-allow-methods"]
                assert "authorization" in before.headers["access-control-allow-headers"].lower()
            answers = [before, await client.get("/health", headers={"Origin": origin})]
            answers.append(await client.post("/v1/caption", content=b"", headers={"Origin": origin}))
            assert [answer.headers.get("access-control-allow-origin") for answer in answers] == [allowed] * 3

    asked(application(pair, access=AccessConfig(cors_origins=("https://a.example",), api_key="s3cret")), test)
