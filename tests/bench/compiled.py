"""Steps of both sides, eager and compiled. Run as a program of its own: the hook that checks shapes cannot be
compiled."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from contracap.bench.steps import Pair, Setting, make_batch
from contracap.bench.timing import peer_module
from contracap.bench.train import checked_passes
from contracap.model.sizes import SIZES
from contracap.pretrained.open_clip import config_to_open_clip


def main() -> None:
    captions = ("a dog", "two dogs in the snow", "the sea")
    setting = Setting(captions=captions, device=torch.device("cpu"), precision="fp32", rounds=7, seed=0, compiled=True)
    tiny = SIZES["tiny"]
    legacy = replace(tiny, text=replace(tiny.text, cls_mask="legacy"))
    with TemporaryDirectory() as folder:
        Path(folder, "tiny.json").write_text(json.dumps(config_to_open_clip(legacy)))
        peer_module("open_clip").add_model_config(folder)
        pair = Pair("tiny", setting)
        batch = make_batch("tiny", setting, samples=4, full=False)
        peer, _ = pair.checked_peer(batch)
    for whose, ways in {"ours": pair.ours.ways(batch), "open_clip's": peer}.items():
        for way in checked_passes(ways, 4, setting):
            print(whose, way)


if __name__ == "__main__":
    main()
