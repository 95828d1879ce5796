"""Kinds of image files: what is read, what is left out, what is refused, in folders and in tars alike."""

import io
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from image_files import encode, noise, tree, write_folder, write_tar
from PIL import Image

from dnas.spec.checks import UserError
from dnas.training.data import load_data
from dnas.training.data_summary import difference

# Python 3.12 dislikes a DataLoader that forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

GOOD, IMAGES = tree()
SIZE = 16


def opened(files, tmp_path, kind, **more):
    """The data of these files, in a folder or in a tar."""
    if kind == "folder":
        more = {"img_size": SIZE, "workers": 0, **more}
        return load_data(data_dir=write_folder(tmp_path / "data", files), **more)
    tmp_path.mkdir(exist_ok=True)
    return load_data(data_dir=write_tar(tmp_path / "data.tar", files, "w"), **more)


both = pytest.mark.parametrize("kind", ["folder", "tar"])


def saved(image, suffix, **how):
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **how)
    return buffer.getvalue()


def shown(data):
    """uint8 [N, C, H, W] of the validation images as the network sees them, unnormalised."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (data.mean, data.std))
    x = torch.cat([x for x, _ in data.val_batches(100)])
    return ((x.double() * std + mean) * 255).round().to(torch.uint8).numpy()


@both
def test_folders_inside_class_folders_belong_to_the_class_on_top(kind, tmp_path):
    files = {name.replace("/cat/", "/cat/2019/a/").replace("/dog/", "/dog/2019/"): c for name, c in GOOD.items()}
    hidden = {
        "train/.trash/0.png": b"",
        "validation/.trash/0.png": b"",
        "train/cat/.cache/1.png": b"",
        "train/cat/._0.png": b"",
    }
    files |= hidden | {"train/__MACOSX/0.png": b""}
    data = opened(files, tmp_path, kind)
    assert data.class_names == ("cat", "dog") and (data.num_train, data.num_val) == (12, 4)
    assert data.summary["train"]["least"] == data.summary["train"]["most"] == 6 and data.summary["left_out"] == {}


@both
def test_what_else_lies_beside_the_splits_is_not_read(kind, tmp_path):
    files = {f"top/{name}": c for name, c in GOOD.items()} | {"top/test/cat/0.png": b"no image", "notes.txt": b"x"}
    assert opened(files, tmp_path, kind).num_train == 12


RAMP = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)  # every value once
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP.T], 2)
GREY = Image.fromarray(COLOUR).convert("L")
OPAQUE = np.full((SIZE, SIZE), 255, np.uint8)
PALETTE = Image.fromarray(COLOUR).quantize(16)
# name: (bytes of a file, its extension, the pixels that are right [H, W, 3])
MODES = {
    "1": (saved(Image.fromarray(RAMP > 99), "png"), "png", np.where(RAMP > 99, 255, 0)[..., None].repeat(3, 2)),
    "L": (saved(Image.fromarray(RAMP), "png"), "png", RAMP[..., None].repeat(3, 2)),
    "LA": (saved(Image.fromarray(np.stack([RAMP, OPAQUE], 2), "LA"), "png"), "png", RAMP[..., None].repeat(3, 2)),
    "P": (saved(PALETTE, "png"), "png", np.array(PALETTE.getpalette()).reshape(-1, 3)[np.array(PALETTE)]),
    "RGB": (saved(Image.fromarray(COLOUR), "png"), "png", COLOUR),
    "RGBA": (saved(Image.fromarray(np.dstack([COLOUR, OPAQUE]), "RGBA"), "png"), "png", COLOUR),
    # without a profile, inks are what is missing of a colour
    "CMYK": (saved(Image.fromarray(np.dstack([255 - COLOUR, 0 * RAMP]), "CMYK"), "tif"), "tif", COLOUR),
    "I;16": (saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "png"), "png", RAMP[..., None].repeat(3, 2)),
    "I;16 of another scale": (
        saved(Image.fromarray(RAMP.astype(np.uint16) * 200), "png"),
        "png",
        np.round(RAMP.astype(float) * 200 / 257)[..., None].repeat(3, 2),
    ),
    "I;16 TIFF": (saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "tif"), "tif", RAMP[..., None].repeat(3, 2)),
    "16-bit PGM": (
        b"P5 16 16 65535\n" + (RAMP.astype(">u2") * 257).tobytes(),
        "pgm",
        RAMP[..., None].repeat(3, 2),
    ),
    "BMP": (saved(Image.fromarray(COLOUR), "bmp"), "bmp", COLOUR),
    "WebP": (saved(Image.fromarray(COLOUR), "webp", lossless=True), "webp", COLOUR),
    "PPM": (saved(Image.fromarray(COLOUR), "ppm"), "ppm", COLOUR),
}


@both
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_gives_the_right_pixels(mode, kind, tmp_path):
    content, suffix, right = MODES[mode]
    files = {f"validation/cat/0.{suffix.upper()}": content}  # in any case; first in a tar, too
    files |= {name: c for name, c in GOOD.items() if not name.startswith("validation/cat")}
    seen = shown(opened(files, tmp_path, kind))[0]
    furthest = int(np.abs(seen.astype(int) - right.transpose(2, 0, 1)).max())
    assert furthest <= (1 if "scale" in mode else 0)  # a half may be rounded either way


@both
@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_an_unknown_range_are_refused_by_name(mode, kind, tmp_path):
    values = RAMP.astype(np.int32 if mode == "I" else np.float32)
    files = GOOD | {"train/cat/z.tif": saved(Image.fromarray(values, mode), "tif")}
    with pytest.raises(UserError, match=f"z.tif.*mode '{mode}'.*expected 8 or 16 bits"):
        opened(files, tmp_path, kind)


@both
def test_other_formats_are_read_and_the_rest_is_counted(kind, tmp_path):
    webp = {name.replace(".png", ".webp"): saved(Image.open(io.BytesIO(c)), "webp") for name, c in GOOD.items()}
    data = opened(GOOD | webp, tmp_path, kind)
    assert data.num_train == 24 and data.summary["warnings"] and data.summary["left_out"] == {}
    assert opened(webp, tmp_path / "only", kind).num_train == 12
    gif = saved(Image.fromarray(RAMP), "gif")
    more = {"train/cat/a.GIF": gif, "train/dog/b.gif": gif, "train/cat/x.txt": b"", "train/dog/LICENSE": b""}
    summary = opened(GOOD | more, tmp_path / "more", kind).summary
    assert summary["left_out"] == {".gif": 2, ".txt": 1, "no extension": 1}
    assert any("image files are left out: 2 .gif" in line for line in summary["warnings"])
    with pytest.raises(UserError, match=r"no image in it \(12 .gif left out\)|no image in it \([0-9]+ .gif left out\)"):
        opened({name.replace(".png", ".gif"): gif for name in GOOD}, tmp_path / "gif", kind)


def test_the_summary_counts_what_was_met(tmp_path):
    files = dict(GOOD)
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    files["train/cat/frames.tif"] = saved(frames[0], "tif", save_all=True, append_images=frames[1:])
    rotated = Image.Exif()
    rotated[0x0112] = 6
    files["train/cat/rotated.jpg"] = saved(Image.fromarray(COLOUR), "jpg", exif=rotated)
    clear = np.dstack([COLOUR, np.where(RAMP > 9, 255, 0).astype(np.uint8)])
    files["train/dog/clear.png"] = saved(Image.fromarray(clear, "RGBA"), "png")
    files["train/dog/wide.png"] = encode(np.zeros((3, 20, 40), np.uint8))
    files["train/dog/cat0.png"] = GOOD["train/cat/0.png"]
    summary = opened(files, tmp_path, "tar", img_size=SIZE).summary
    assert summary["classes"] == 2 and summary["sizes"] == {"16x16": 20, "20x40": 1} and summary["other_sizes"] == 0
    assert summary["modes"] == {"RGB": 19, "L": 1, "RGBA": 1}
    assert (summary["train"]["images"], summary["train"]["least"], summary["train"]["most"]) == (17, 8, 9)
    text = "; ".join(summary["warnings"])
    for said in ("1 of 21 images have several frames", "1 of 21 images have an EXIF rotation", "transparent pixels"):
        assert said in text
    assert "1 image is in more than one class" in text
    assert "4 of 4 validation images are training images" in text  # as `tree` makes them
    assert "fewer than 10 training images: 'cat' 8, 'dog' 9" in text
    assert shown(opened(files, tmp_path / "b", "tar", img_size=SIZE)).shape[0] == 4


def test_good_data_warn_of_nothing(tmp_path):
    files, _ = tree(train=12, val=2)
    files |= {n: encode(noise(1, 16, seed=50 + k)[0]) for k, n in enumerate(files) if n.startswith("val")}
    assert opened(files, tmp_path, "folder").summary["warnings"] == []


@both
@pytest.mark.parametrize(("counts", "warned"), [((100, 1, 1), True), ((10, 9, 11), False)])
def test_a_class_that_is_most_of_the_data_is_named(counts, warned, kind, tmp_path):
    files = {}
    for name, count in zip("abc", counts, strict=True):
        for k in range(count):
            content = encode(noise(1, 16, seed=k)[0])
            files |= {f"train/{name}/{k}.png": content, f"validation/{name}/{k}.png": content}
    summary = opened(files, tmp_path, kind).summary
    share = counts[0] / sum(counts)
    assert any(f"{100 * share:.2f} % of the validation images" in line for line in summary["warnings"]) == warned
    if warned:
        assert summary["largest_class"] == {"name": "a", "share": pytest.approx(share)}


@both
def test_images_of_two_sides(kind, tmp_path):
    wide = {name: encode(noise(1, 96, seed=k)[0][:, :24]) for k, name in enumerate(GOOD)}
    data = opened(wide, tmp_path, kind, img_size=(24, 96))
    x, _ = next(iter(data.train_batches(4, seed=0)))
    assert data.img_size == (24, 96) and x.shape == (4, 3, 24, 96) and data.summary["sizes"] == {"24x96": 16}
    assert not any("crop" in line for line in data.summary["warnings"])
    right = np.stack([np.array(Image.open(io.BytesIO(wide[n]))) for n in sorted(wide) if n.startswith("val")])
    assert (shown(data) == right.transpose(0, 3, 1, 2)).all()
    cropped = opened(wide, tmp_path / "b", kind, img_size=24)
    assert any("leaves out 75 % of an image of 24x96" in line for line in cropped.summary["warnings"])
    assert opened(wide, tmp_path / "c", kind, img_size=(12, 48)).img_size == (12, 48)


@pytest.mark.parametrize("size", [(24, 7), (24, 24, 24), (), "24", (24.0, 96)])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match="image size"):
        load_data(img_size=size)


@both
def test_names_in_two_forms_of_unicode(kind, tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert composed != apart
    files = {
        name.replace("train/cat", f"train/{composed}").replace("validation/cat", f"validation/{apart}"): c
        for name, c in GOOD.items()
    }
    assert opened(files, tmp_path, kind).class_names == (composed, "dog")
    with pytest.raises(UserError, match="two folders in train"):
        opened(files | {f"train/{apart}/9.png": GOOD["train/cat/0.png"]}, tmp_path / "b", kind)


@both
def test_a_file_without_bytes_is_refused_by_name(kind, tmp_path):
    with pytest.raises(UserError, match=r"train/cat/z\.webp' cannot be decoded"):
        opened(GOOD | {"train/cat/z.webp": b""}, tmp_path, kind)


def test_links(tmp_path):
    root = tmp_path / "data"
    write_folder(root, GOOD)
    (root / "train" / "emu").symlink_to(root / "train" / "cat")
    (root / "validation" / "emu").symlink_to(root / "validation" / "cat")
    data = load_data(data_dir=str(root), img_size=16, workers=0)
    assert data.class_names == ("cat", "dog", "emu")
    assert any("more than one class" in line for line in data.summary["warnings"])
    loop = root / "train" / "cat" / "loop"
    loop.symlink_to(root / "train")
    with pytest.raises(UserError, match="loop' is a link to a folder above it"):
        load_data(data_dir=str(root), img_size=16)
    loop.unlink()
    (root / "train" / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png' is a broken link"):
        load_data(data_dir=str(root), img_size=16)


def test_what_is_broken_beside_the_splits_is_not_looked_at(tmp_path):
    root = tmp_path / "data"
    write_folder(root / "top", GOOD)
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "top" / "gone.png").symlink_to(root / "nowhere.png")
    assert load_data(data_dir=str(root), img_size=16, workers=0).num_train == 12


def test_random_crops_keep_the_shape_of_images_that_are_not_square(tmp_path):
    """The slopes of a ramp from left to right and of one from top to bottom tell how each crop was stretched."""
    height, width = 64, 192
    across, down = (np.linspace(0, 255, n).astype(np.uint8) for n in (width, height))
    ramp = np.stack(np.broadcast_arrays(across[None], down[:, None], np.uint8(0)))
    files = {name: encode(ramp) for name in GOOD}
    data = opened(files, tmp_path, "folder", img_size=(height, width))
    x = torch.cat([x for seed in range(20) for x, _ in data.train_batches(12, seed=seed)])
    x = x * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
    wide = (x[:, 0, :, -20] - x[:, 0, :, 20]).mean(1).abs() * width / (width - 40)
    high = (x[:, 1, -7] - x[:, 1, 7]).mean(1).abs() * height / (height - 14)
    stretched = (wide / high).log()
    assert len(x) == 240 and stretched.abs().max() < np.log(4 / 3) + 0.1  # timm's range for square images
    assert stretched.std() > 0.1 and abs(stretched.mean()) < 0.05


def test_a_tar_of_tars_folders_first_and_a_leading_dot(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("./", "./train/", "./train/cat/"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, content in GOOD.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert load_data(data_dir=str(path)).num_train == 12


@pytest.mark.parametrize("change", ["nothing", "a class", "an image more", "an image of other bytes", "a name"])
@both
def test_a_digest_tells_other_data(change, kind, tmp_path):
    files = dict(GOOD)
    if change == "a class":
        files = {name.replace("/dog/", "/cow/"): c for name, c in files.items()}
    elif change == "an image more":
        files["train/cat/9.png"] = files["train/cat/0.png"]
    elif change == "an image of other bytes":
        files["train/cat/0.png"] = encode(noise(1, 16, seed=9)[0][:, :, :8].repeat(2, 2))
    elif change == "a name":
        files["train/cat/0b.png"] = files.pop("train/cat/0.png")
    one, other = (opened(f, tmp_path / p, kind, img_size=SIZE) for f, p in ((GOOD, "a"), (files, "b")))
    said = difference(one.summary, other.summary, (one.class_names, other.class_names))
    assert (
        said
        == {
            "nothing": "",
            "a class": "class 'cow' was not there",
            "an image more": "12 train images are now 13",
            "an image of other bytes": "names, sizes or labels of the images have changed",
            "a name": "names, sizes or labels of the images have changed",
        }[change]
    )


def test_a_file_that_goes_during_the_run_is_named(tmp_path):
    root = write_folder(tmp_path / "data", GOOD)
    for workers in (0, 1):
        data = load_data(data_dir=root, img_size=16, workers=workers)
        file = tmp_path / "data" / "train" / "cat" / "0.png"
        content = file.read_bytes()
        file.write_bytes(content[:40])
        with pytest.raises(
            UserError, match=r"^image '.*train/cat/0\.png' cannot be decoded: expected a whole image file$"
        ):
            list(data.train_batches(12, seed=0))
        file.write_bytes(content)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "ppm", "pgm"])
def test_headers_of_many_files(suffix, tmp_path, monkeypatch):
    """Of more files than are decoded before a run, only headers are read: sizes and modes are the same."""
    files = {
        n.replace(".png", f".{suffix}"): saved(Image.open(io.BytesIO(c)), suffix.replace("pgm", "ppm"))
        for n, c in GOOD.items()
    }
    whole = opened(files, tmp_path, "folder").summary
    monkeypatch.setattr("dnas.training.data._FULL_CHECK", 0)
    headers = opened(files, tmp_path, "folder").summary
    assert all(headers[key] == whole[key] for key in ("sizes", "modes", "train", "validation", "digest"))
    (tmp_path / "data" / "train" / "cat" / f"0.{suffix}").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be decoded"):
        opened({}, tmp_path, "folder")


@both
def test_a_name_that_is_no_utf_8(kind, tmp_path):
    name = b"train/cat/\xe9.png".decode("utf-8", "surrogateescape")
    assert opened(GOOD | {name: GOOD["train/cat/0.png"]}, tmp_path, kind).num_train == 13
