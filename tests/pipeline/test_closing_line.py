"""The last line of `extract` says what became of everything that was seen."""

from pathlib import Path

from pipeline.extract import closing_line


def test_the_last_line_counts_images_shards_rejects_what_was_left_out_and_classes():
    info = {"samples": 1200, "shards": [{}, {}], "rejected": 3, "classes": ["cat", "dog"]}

    built = closing_line(Path("out"), info, "1 .heic", built=2)
    again = closing_line(Path("out"), info | {"classes": []}, "", built=0)

    assert built == "out: 1,200 images in 2 shards; 3 rejected; left out: 1 .heic; 2 classes (cat, dog)"
    assert again == "out: 1,200 images in 2 shards, built before; 3 rejected; left out: nothing; no classes"
