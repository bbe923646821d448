"""PNG and JPEG over multipart, and Prometheus metrics."""

from __future__ import annotations

import http.client
import io
import json
import uuid

import numpy as np
from PIL import Image

from rewards.http.client import HttpScorer


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def post(server, files: list[bytes], fields: dict[str, list[str]]):
    edge = uuid.uuid4().hex
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, values in fields.items()
        for value in values
    ]
    for index, data in enumerate(files):
        head = f'--{edge}\r\nContent-Disposition: form-data; name="images"; filename="{index}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    body = b"".join(parts) + f"--{edge}--\r\n".encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", "/score", body, {"Content-Type": f"multipart/form-data; boundary={edge}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_a_png_form_scores_as_the_array_does(shared_server, batch):
    server = shared_server("brightness")
    images, prompts, metadata = batch
    files = [encoded(image) for image in images]
    for fields in (
        {"prompts": [json.dumps(prompts)]},
        {"prompts": list(prompts), "metadata": [json.dumps(metadata)]},
    ):
        status, answer = post(server, files, fields)
        assert status == 200
        assert answer["scores"]["brightness"] == HttpScorer(server.url).score(*batch)["brightness"].tolist()


def test_jpeg_and_grey_files_are_taken_and_nan_travels_as_null(shared_server, batch):
    grey = Image.fromarray(batch[0][0]).convert("L")
    status, answer = post(shared_server("brightness"), [encoded(grey, "JPEG")], {"prompts": ["p"]})
    assert status == 200 and abs(answer["scores"]["brightness"][0] - np.asarray(grey).mean()) < 3
    files = [encoded(image) for image in batch[0]]
    status, answer = post(shared_server("odd"), files, {"prompts": batch[1]})
    assert status == 200 and answer["scores"]["odd"] == [None, None, None, 1e30, 0.5]


RGB = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_forms_that_do_not_fit_together_are_typed_errors(shared_server):
    server = shared_server("brightness")
    one = encoded(RGB)
    for files, fields, status, said in [
        ([], {"prompts": ["p"]}, 422, "at least one file"),
        ([one, one], {"prompts": ["p"]}, 422, "2 images and 1 prompts"),
        ([one, encoded(RGB[:8])], {"prompts": ["p", "q"]}, 422, "send one size a request"),
        ([one], {"prompts": ["[1]"]}, 400, "valid Unicode strings"),
        ([one], {"prompts": ["[not json"]}, 400, "no JSON list"),
        ([one], {"prompts": ["p"], "metadata": ["[3]"]}, 400, "list of 1 objects"),
        ([one], {"prompts": ["p"], "token": ["x"]}, 400, "'token' is unknown"),
    ]:
        answer = post(server, files, fields)
        assert answer[0] == status and said in answer[1]["error"]["message"], answer


def test_a_body_that_is_no_form_though_it_says_so_is_refused(shared_server):
    connection = http.client.HTTPConnection("127.0.0.1", shared_server("brightness").port, timeout=10)
    connection.request("POST", "/score", b"\xff\xfe" * 50, {"Content-Type": "multipart/form-data"})
    response = connection.getresponse()
    assert response.status == 400 and json.loads(response.read())["error"]["type"] == "malformed"
    connection.close()


def metric(server, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def test_metrics_count_requests_by_outcome_images_and_invalid_scores(serve_reward, batch):
    server = serve_reward("odd")
    HttpScorer(server.url).score(*batch)
    HttpScorer(server.url).score(*batch)
    post(server, [b"hello"], {"prompts": ["p"]})
    assert metric(server, "flowalign_reward_images_total") == 10
    assert metric(server, "flowalign_reward_invalid_scores_total") == 6
    assert metric(server, 'flowalign_reward_requests_total{outcome="ok"') == 2
    assert metric(server, 'flowalign_reward_requests_total{outcome="malformed"') == 1
    assert metric(server, "flowalign_reward_batch_images_sum") == 10
    assert metric(server, "flowalign_reward_pending_images") == 0


def test_a_declared_charset_is_not_believed(shared_server):
    """Texts are UTF-8; a stranger's codec could take hours, and a guessed one would change the prompt."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + encoded(RGB) + b"\r\n"
        b'--x\r\nContent-Disposition: form-data; name="prompts"\r\n\r\n' + "ß–é".encode() + b"\r\n"
        b'--x\r\nContent-Disposition: form-data; name="metadata"\r\n\r\n[{"i": 3}]\r\n--x--\r\n'
    )
    for kind in ('boundary=x; charset=utf-16; a="', "boundary=x; charset=punycode", 'charset=utf-7; boundary="x"'):
        connection = http.client.HTTPConnection("127.0.0.1", shared_server("echo").port, timeout=10)
        connection.request("POST", "/score", body, {"Content-Type": f"multipart/form-data; {kind}"})
        assert json.loads(connection.getresponse().read())["scores"] == {"index": [3.0], "length": [3.0]}
        connection.close()


def test_files_that_a_form_refused_before_are_converted(shared_server):
    """Alpha on white, 16 bits >> 8, CMYK to RGB, sideways photos upright; a moving picture is no picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = {
        encoded(Image.new("RGBA", (16, 16))): 255,
        encoded(Image.new("LA", (16, 16), (100, 128))): 177,
        encoded(Image.fromarray(np.full((16, 16), 40_000, np.uint16))): 156,
        encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 155)), "JPEG"): 100,
        encoded(Image.new("P", (16, 16)), transparency=0): 255,
    }
    server = shared_server("brightness")
    status, answer = post(server, list(seen), {"prompts": ["p"] * len(seen)})
    assert status == 200
    np.testing.assert_allclose(answer["scores"]["brightness"], list(seen.values()), atol=1)
    upright, turned = encoded(Image.new("L", (16, 24))), encoded(Image.new("L", (24, 16)), exif=exif)
    assert post(server, [upright, turned], {"prompts": ["p", "q"]})[0] == 200
    moving = encoded(RGB, save_all=True, append_images=[Image.fromarray(RGB[::-1])])
    status, answer = post(server, [moving], {"prompts": ["p"]})
    assert status == 422 and answer["error"]["message"] == "image 0 is a PNG with several frames"
