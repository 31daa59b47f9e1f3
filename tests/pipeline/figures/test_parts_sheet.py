"""The image of a learned run."""

import numpy as np
from conftest import photographs
from PIL import Image

from partlearn.config import LearnConfig
from partlearn.train import learn
from pipeline.figures.parts_sheet import show_parts
from training.config import RunConfig
from training.contact_sheet import CELL, GAP, HEADER


def test_a_run_is_shown_without_its_torn_images_and_stands_when_they_have_moved(tmp_path, capsys):
    folder = photographs(tmp_path / "photos", 3)
    (folder / "torn.jpg").write_bytes(b"no image")
    run = RunConfig(out=tmp_path / "run", device="cpu", precision="fp32")
    config = LearnConfig(
        images=str(folder), encoder="random:vit_tiny_patch16_224", grid=4, num_parts=3, batch_size=4, run=run
    )
    learn(config)

    show_parts(config)

    with Image.open(run.out / "parts.png") as sheet:
        assert 3 * CELL < sheet.width < 4 * CELL
        assert 3 * CELL < sheet.height < 4 * CELL
        grey = np.asarray(sheet.convert("L"), dtype=float)[HEADER:]
        image, foreground = (grey[:, GAP + (CELL + GAP) * at :][:, :CELL].mean() for at in (0, 1))
        assert foreground < 0.8 * image  # from the best cell, as it is, to the last, a tenth as bright
    (run.out / "parts.png").unlink()
    folder.rename(tmp_path / "elsewhere")
    show_parts(config)
    assert "parts.png was not drawn: no images at" in capsys.readouterr().err
