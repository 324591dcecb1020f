"""Published checkpoints: files written from descriptions of the four programs become model folders that answer
as those programs do, with every key accounted for; damaged files are one line."""

import argparse
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from refseg_nb.cli import app
from refseg_nb.data.words import Vocabulary
from refseg_nb.errors import ExistsError, InputError, NotFoundError
from refseg_nb.models.cmpc import CMPC, CMPC_PRESETS, CMPCConfig, DeepLabResNet
from refseg_nb.models.hub import load_model
from refseg_nb.models.losses import aligned, training_target
from refseg_nb.models.published import (
    caffe_name,
    clean_weights,
    convert_published,
    layout_name,
    match_head,
    read_published,
    read_words,
    tensorflow_scopes,
    weights_in,
)
from refseg_nb.models.registry import create_model, model_config

WORDS = ["the", "man", "on", "left", "red", "tie", "of", "dog", "in", "white"]
OURS = ["<pad>", "<unk>", *WORDS]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shaken(module):
    "No parameter at a value that hides a swap (ones of a norm, zeros of a bias)."
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, b in module.named_buffers():
            if name.endswith("running_var"):
                b.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                b.normal_(std=0.3)
    return module.eval()


# ---- SHNet as its program computes it, written from the description alone

C, GRID, DIM, HEADS, RAW = 16, 6, 8, 2, (48, 96, 160)
SHNET = dict(backbone="refshapes", image_size=96, grid=GRID, channels=C, word_dim=DIM, sfm_heads=HEADS)
SHNET |= dict(sfm_ffn=C, aspp_rates=(6, 12, 24), decoder_widths=(C, C, C, 8))  # 512 wide as everything else


class Layer(nn.Module):
    "A layer of the encoder: norm first, positions in queries and keys only."

    def __init__(self):
        super().__init__()
        self.look = nn.MultiheadAttention(C, HEADS, batch_first=True)
        self.wide, self.back = nn.Linear(C, C), nn.Linear(C, C)
        self.before, self.between = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x, where, padded):
        y = self.before(x)
        x = x + self.look(y + where, y + where, y, key_padding_mask=padded, need_weights=False)[0]
        return x + self.back(self.wide(self.between(x)).relu())


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack, self.end = nn.ModuleList(Layer() for _ in range(2)), nn.LayerNorm(C)


def conv_bn(i, o, kernel, rate=1):
    return nn.Sequential(
        nn.Conv2d(i, o, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False), nn.BatchNorm2d(o)
    )


def waves(n, channels):
    "sin and cos in turn, n positions."
    out = torch.zeros(n, channels)
    for p, k in itertools.product(range(n), range(channels)):
        angle = p / 10_000 ** (2 * (k // 2) / channels)
        out[p, k] = math.cos(angle) if k % 2 else math.sin(angle)
    return out


class Program(nn.Module):
    "The released SHNet's head: 141 keys, no word vectors."

    def __init__(self):
        super().__init__()
        self.reader = nn.LSTM(DIM, C, batch_first=True)
        self.squeeze = nn.ModuleDict(
            {
                f"layer{k}": nn.Sequential(nn.Conv2d(n, C, 3, 2, 1), nn.BatchNorm2d(C))
                for k, n in zip((2, 3, 4), RAW)
            }
        )
        self.encoder = Encoder()
        self.gate = nn.ModuleDict(
            {f"g{k}": nn.Sequential(nn.Conv2d(2 * C, C, 3, padding=1), nn.BatchNorm2d(C)) for k in (2, 3, 4)}
        )
        self.merge = nn.Sequential(nn.Conv3d(C, C, 3, padding=(0, 1, 1)), nn.BatchNorm3d(C))
        self.one, self.six, self.twelve, self.far = (
            conv_bn(C, C, k, r) for k, r in ((1, 1), (3, 6), (3, 12), (3, 24))
        )
        self.whole, self.mix = conv_bn(C, C, 1), conv_bn(5 * C, C, 1)
        self.up = nn.Sequential(*(conv_bn(C, C, 3) for _ in range(3)), conv_bn(C, 8, 3))
        self.answer = nn.Conv2d(8, 1, 3, padding=1)

    def where(self, words):
        y, x = waves(GRID, C // 2), waves(GRID, C // 2)
        places = [torch.cat([x[j], y[i]]) for i in range(GRID) for j in range(GRID)]
        return torch.cat([torch.stack(places), waves(words, C)])

    def forward(self, raw, vectors, real):
        "Raw levels of B images, word vectors [B, T, D], and which words are real: logits."
        t, n = vectors.shape[1], GRID * GRID
        said = self.reader(vectors)[0] * real[..., None]
        maps, averages = [], []
        for k, level in zip((2, 3, 4), raw):
            v = F.leaky_relu(self.squeeze[f"layer{k}"](F.adaptive_max_pool2d(level, 2 * GRID)))
            x = torch.cat([v.flatten(2).transpose(1, 2), said], 1)
            padded = torch.cat([torch.zeros(len(v), n, dtype=torch.bool), ~real], 1)
            for layer in self.encoder.stack:
                x = layer(x, self.where(t), padded)
            x = self.encoder.end(x)
            maps.append(x[:, :n].transpose(1, 2).reshape(v.shape))
            averages.append(torch.stack([x[b, n : n + int(real[b].sum())].mean(0) for b in range(len(v))]))
        grown = []
        for i in range(3):
            g = maps[i]
            for j in range(3):
                if j != i:
                    tiled = averages[j][:, :, None, None].expand(-1, -1, GRID, GRID)
                    g = g + self.gate[f"g{i + 2}"](torch.cat([maps[i], tiled], 1)).sigmoid() * maps[j]
            grown.append(g)
        g = F.leaky_relu(self.merge(torch.stack(grown, 2)))[:, :, 0]
        seen = [part(g).relu() for part in (self.one, self.six, self.twelve, self.far)]
        seen.append(self.whole(F.adaptive_avg_pool2d(g, 1)).relu().expand(-1, -1, GRID, GRID))
        x = self.mix(torch.cat(seen, 1)).relu()
        for i, part in enumerate(self.up):
            x = part(x).relu()
            if i < 2:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.answer(x)[:, 0]


def phrases():
    words = torch.tensor([[2, 3, 4, 5, 6], [7, 9, 0, 0, 0], [11, 4, 2, 0, 0]])
    return words, words != 0


def read_head(file, config):
    "Our model with the head of a file and word vectors drawn here."
    model = create_model("shnet", "released", vocab_size=12, **config)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("backbone.", "text.emb"))}
    names = match_head(file, own)
    assert len(names) == len(own) == 141 and set(names.values()) == set(own)
    model.load_state_dict({names[k]: v for k, v in file.items()}, strict=False)
    return model.eval()


def test_released_shnet_is_its_program_to_the_mask():
    program = shaken(Program())
    model = read_head(program.state_dict(), SHNET)
    words, real = phrases()
    images = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        want = program(model.backbone(images), model.text.embedding(words), real)
        got = model(images, words)
        masks = torch.rand(3, 40, 40)
        drawn = F.interpolate(want[:, None], (40, 40), mode="bilinear", align_corners=True)[:, 0]
    assert got.shape == (3, 24, 24) and want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(aligned(got, masks), drawn, atol=1e-4, rtol=0)


def test_the_released_target_is_dilated_with_aligned_corners():
    mask = torch.zeros(1, 30, 40)
    mask[0, 10:17, 5:13] = 1
    want = torch.zeros(1, 16, 16)
    for y, x in itertools.product(range(16), repeat=2):
        at = (y * 29 / 15, x * 39 / 15)  # the corners stay
        corners = itertools.product(*({math.floor(a), math.ceil(a)} for a in at))
        want[0, y, x] = float(any(mask[0, i, j] > 0 for i, j in corners))
    assert torch.equal(training_target(mask, 16, "dilated", align_corners=True), want)


PARTS = (
    "reader",
    "squeeze",
    "encoder",
    "gate",
    "merge",
    ("one", "six", "twelve", "far", "whole", "mix"),
    ("up", "answer"),
)


@pytest.mark.parametrize("order", [(6, 5, 4, 3, 2, 1, 0), (2, 0, 1, 5, 3, 4, 6), (3, 1, 5, 0, 6, 2, 4)])
def test_parts_may_come_in_any_order_and_under_any_name(order):
    program = shaken(Program())
    state, file = program.state_dict(), {}
    for part in order:
        file |= {f"net.p{part}.{k}": v for k, v in state.items() if k.startswith(PARTS[part])}
    one, other = read_head(file, SHNET), read_head(state, SHNET)
    assert all(
        torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items() if "text.emb" not in k
    )


def test_levels_in_reverse_and_norms_behind_all_convolutions_are_sorted():
    program = shaken(Program())
    state = program.state_dict()
    turned = {}
    for part in ("squeeze.layer", "gate.g"):
        own = [k for k in state if k.startswith(part)]
        # convolutions of levels 4, 3, 2, then their norms
        turned |= {k: state[k] for n in "01" for level in "432" for k in own if f"{level}.{n}." in k}
    file = {k: v for k, v in state.items() if k not in turned} | turned
    one, other = read_head(file, SHNET), read_head(state, SHNET)
    assert all(
        torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items() if "text.emb" not in k
    )


def test_a_last_norm_that_is_listed_first_is_still_the_last():
    program = shaken(Program())
    state = program.state_dict()
    end = {k: v for k, v in state.items() if k.startswith("encoder.end")}
    file = {k: v for k, v in state.items() if k.startswith(("reader", "squeeze"))} | end | state
    model = read_head(file, SHNET)
    assert torch.equal(model.sfm[0].final.weight, state["encoder.end.weight"])
    assert torch.equal(model.sfm[0].layers[0].norm1.weight, state["encoder.stack.0.before.weight"])


def test_what_is_no_released_shnet_is_said_in_a_few_words():
    state = Program().state_dict()
    own = create_model("shnet", "released", vocab_size=12, **SHNET).state_dict()
    own = {k: v for k, v in own.items() if not k.startswith(("backbone.", "text.emb"))}
    with pytest.raises(InputError, match=r"not found: decoder.last \[1, 8, 3, 3\]"):
        match_head({k: v for k, v in state.items() if not k.startswith("answer")}, own)
    with pytest.raises(InputError, match=r"not expected: more \[3, 3\]"):
        match_head(state | {"more.weight": torch.ones(3, 3)}, own)
    torn = [k for k in state if not k.startswith("one.")] + [k for k in state if k.startswith("one.")]
    with pytest.raises(InputError, match="their order is unknown"):
        match_head({k: state[k] for k in torn}, own)


# ---- CMPC, from the names of its variables

CMPC_TINY = dict(
    backbone="refshapes", image_size=96, grid=4, word_dim=6, channels=8, fused=4, heads=5, factor=8
)


def tensorflow_file(c=8, d=4, dim=6, g=4, raw=RAW, words=12, parser=4):
    "CMPC's variables in TensorFlow's shapes, with Adam's beside them."
    shapes = {"Variable": (words, dim), "Variable_1": ()}
    shapes |= {"RNN/multi_rnn_cell/cell_0/basic_lstm_cell/kernel": (dim + c, 4 * c)}
    shapes |= {"RNN/multi_rnn_cell/cell_0/basic_lstm_cell/bias": (4 * c,)}

    def conv(scope, i, o, k=1):
        shapes.update({f"{scope}/DW": (k, k, i, o), f"{scope}/biases": (o,)})

    conv("words_parse_1", c, parser)
    conv("words_parse_2", parser, 4)
    for level, n in zip(("c3", "c4", "c5"), raw):
        conv(f"{level}_lateral", n, c)
        for head in range(1, 6):
            conv(f"vis_trans_{level}_head{head}", c + 8, c)
            conv(f"lang_trans_{level}_head{head}", c, c)
        for scope in ("words_trans", "spa_graph_trans2", "gconv_update_spa_graph"):
            conv(f"{scope}_{level}", c, c)
        for scope in ("gconv_feat_ln", "gconv_update_ln"):
            shapes |= {f"{scope}_spa_graph_{level}/{kind}": (c,) for kind in ("beta", "gamma")}
        conv(f"fusion_{level}", 3 * c + 8, d)
        conv(f"score_{level}", d, 1, 3)
    for twice in ("", "_2"):
        for level in ("c3", "c4", "c5"):
            conv(f"spa_graph_key_{level}{twice}gv_f1", d, d)
            conv(f"lang_query_{level}{twice}gv_f1", c, d)
            conv(f"gv_lang_{level}{twice}gv_f1", d + c, d)
            for k in (1, 2):
                conv(f"lang_feat_{level}{twice}_f{k}", d, d)
                conv(f"trans_feat_{level}{twice}_f{k}", d, d)
    shapes |= {"rnn/conv_lstm_cell/kernel": (1, 1, 2 * d, 4 * d)}
    shapes |= {f"rnn/conv_lstm_cell/W_{gate}": (g, g, d) for gate in ("ci", "cf", "co")}
    for n in ("", "_1", "_2", "_3", "_4"):
        shapes |= {f"rnn/conv_lstm_cell/LayerNorm{n}/{kind}": (d,) for kind in ("beta", "gamma")}
    conv("score", d, 1, 3)
    shapes |= {"score/DW/Adam": (3, 3, d, 1), "score/DW/Adam_1": (3, 3, d, 1)}
    file = {f"text_objseg/{name}": 0.5 * torch.randn(shape) for name, shape in sorted(shapes.items())}
    return file | {"beta1_power": torch.tensor(0.9), "text_objseg/beta2_power": torch.tensor(0.999)}


def saved(file, path):
    "The variables as somebody takes them out of TensorFlow."
    np.savez(path, **{k: v.numpy() for k, v in file.items()})
    return path


def word_list(path, words=("<pad>", "<go>", "<eos>", "<unk>", *WORDS[:8])):
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    return path


def test_every_variable_of_cmpc_goes_somewhere_and_nothing_twice():
    scopes, file = tensorflow_scopes(), tensorflow_file()
    found = {name: layout_name(name, scopes) for name in file}
    assert {name for name, to in found.items() if to is None} == {
        "beta1_power",
        "text_objseg/beta2_power",
        "text_objseg/Variable_1",
        "text_objseg/score/DW/Adam",
        "text_objseg/score/DW/Adam_1",
    }
    places = [to for to in found.values() if to]
    assert len(set(places)) == len(places) == len(file) - 5


@pytest.fixture(scope="module")
def cmpc(tmp_path_factory):
    "A CMPC file, and the model of the folder that it became."
    torch.manual_seed(1)
    folder, file = tmp_path_factory.mktemp("cmpc"), tensorflow_file()
    account = convert_published(
        saved(file, folder / "model.npz"),
        "cmpc",
        folder / "out",
        overrides=CMPC_TINY,
        vocabulary=word_list(folder / "words.txt"),
    )
    return file, account, *load_model(folder / "out")[:2]


def test_every_key_of_cmpc_is_accounted_for(cmpc):
    file, account, model, vocabulary = cmpc
    assert account.used.keys() | account.ignored.keys() == file.keys()
    assert (
        set(account.ignored.values()) == {"of the training run, not of the model"}
        and len(account.ignored) == 5
    )
    ours = {name for names in account.used.values() for name in names}
    lacking = {k for k in model.state_dict() if k not in ours and not k.startswith("backbone.")}
    assert lacking == {"reader.encoder.lstm.bias_hh_l0"} <= account.missing.keys()
    assert vocabulary.itos == ["<pad>", "<unk>", "<go>", "<eos>", *WORDS[:8]]


def test_cmpc_reads_the_vectors_of_its_own_words(cmpc):
    file, _, model, vocabulary = cmpc
    table, theirs = model.reader.encoder.embedding.weight, file["text_objseg/Variable"]
    for word, row in {"<pad>": 0, "<unk>": 3, "<go>": 1, "the": 4, "dog": 11}.items():
        assert torch.equal(table[vocabulary.itos.index(word)], theirs[row]), word


def test_cmpc_s_heads_are_stacked_in_their_order(cmpc):
    file, _, model, _ = cmpc
    for head in range(5):
        theirs = file[f"text_objseg/vis_trans_c4_head{head + 1}/DW"][0, 0].T
        ours = model.levels[1].fusion.visual.weight[8 * head : 8 * head + 8, :, 0, 0]
        assert torch.equal(ours, theirs)


def test_cmpc_s_exchange_is_the_described_one_on_its_own_variables(cmpc):
    file, _, model, _ = cmpc
    at = lambda scope, x: x @ file[f"text_objseg/{scope}/DW"][0, 0] + file[f"text_objseg/{scope}/biases"]
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    maps, sentence = [torch.randn(4, 4, 4) for _ in range(3)], torch.randn(8)  # [H, W, C] and [words]
    want = maps
    for twice in ("", "_2"):
        before, want = want, []
        for i, level in enumerate(("c3", "c4", "c5")):
            of, x = f"{level}{twice}", before[i].reshape(16, 4)
            look = (at(f"spa_graph_key_{of}gv_f1", x) @ at(f"lang_query_{of}gv_f1", sentence) / 2).softmax(0)
            context = unit(at(f"gv_lang_{of}gv_f1", torch.cat([look @ x, sentence])))
            new = before[i]
            for k, j in enumerate([j for j in range(3) if j != i], 1):
                gate = at(f"lang_feat_{of}_f{k}", context).sigmoid()
                new = new + at(f"trans_feat_{of}_f{k}", before[j]).relu() * gate
            want.append(unit(new))
    got = [m.permute(2, 0, 1)[None] for m in maps]
    with torch.no_grad():
        for round_ in model.exchange.rounds:
            others = [[got[j] for j in range(3) if j != i] for i in range(3)]
            got = [part(got[i], others[i], sentence[None])[0] for i, part in enumerate(round_)]
    for a, b in zip(got, want):
        torch.testing.assert_close(a[0].permute(1, 2, 0), b, atol=1e-4, rtol=0)


def test_deeplab_s_backbone_under_caffe_s_names():
    "Stage by stage, as Caffe's ResNet-101 is written down: every name of torchvision's is found once."
    names = ["conv1/weights", *(f"bn_conv1/{k}" for k in ("gamma", "beta", "moving_mean", "moving_variance"))]
    many = lambda n: ["a", *(f"b{k}" for k in range(1, n))]
    for stage, blocks in ((2, "abc"), (3, many(4)), (4, many(23)), (5, "abc")):
        for block in blocks:
            for branch in ["1"] * (block == "a") + ["2a", "2b", "2c"]:
                names.append(f"res{stage}{block}_branch{branch}/weights")
                for k in ("gamma", "beta", "moving_mean", "moving_variance"):
                    names.append(f"bn{stage}{block}_branch{branch}/{k}")
    with torch.device("meta"):
        body = DeepLabResNet().body.state_dict()
    ours = [caffe_name(name) for name in names]
    assert sorted(ours) == sorted(k for k in body if not k.endswith("num_batches_tracked"))
    assert caffe_name("res4b22_branch2c/weights") == "layer3.22.conv3.weight"
    assert caffe_name("bn5a_branch1/moving_variance") == "layer4.0.downsample.1.running_var"
    assert caffe_name("fc1_voc12_c0/weights") is None


def test_cmpc_begins_as_its_program_does():
    config = CMPCConfig(
        **CMPC_TINY | dict(channels=200, fused=80, grid=6, heads=2, word_dim=50), backbone_weights="none"
    )
    model = CMPC(config, 12)
    bounds = {  # fans of the program's kernels
        model.levels[1].lateral.weight: (96, 200),
        model.levels[0].fusion.visual.weight: (208, 200),  # of one head
        model.levels[0].fusion.language.weight: (200, 200),
        model.reader.encoder.lstm.weight_ih_l0: (250, 800),
        model.reader.encoder.lstm.weight_hh_l0: (250, 800),
        model.exchange.fuse.input.weight: (160, 320),
        model.exchange.fuse.state.weight: (160, 320),
        model.exchange.fuse.peepholes: (36, 480),
        model.score.weight: (720, 9),
        model.exchange.rounds[1][2].context.weight: (280, 80),
    }
    for weight, (fan_in, fan_out) in bounds.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < weight.detach().abs().max() <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    biases = [p for k, p in model.named_parameters() if k.endswith("bias") and "norm" not in k]
    assert all((b == 0).all() for b in biases if b.requires_grad)
    assert model.reader.encoder.lstm.bias_hh_l0[200:400].eq(1).all()
    assert not CMPC_PRESETS["refshapes"].xavier  # recorded runs began with torch's values


# ---- the four, from a file to an answer on real photographs


def pieces(path):
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"abcdefghijklmnopqrstuvwxyz"]))
    return path


def swin_sizes(name):
    from test_crossvlt import published_layout
    from test_lavt import published_checkpoint

    if name == "lavt":
        return published_checkpoint(16, (2, 2, 2, 2), (1, 2, 4, 8), 3, 16, 2, 40)
    layout = published_layout(16, (2, 2, 2, 2), (1, 2, 4, 8), 3, 48, 1, vocab=40, align=20)
    file = {k: 0.05 * torch.randn(shape) for k, shape in layout.items()}
    return {k: v.abs() + 0.5 if "running_var" in k or k == "temp" else v for k, v in file.items()}


SWIN = dict(backbone="swin-refshapes", window=3, image_size=96)
SIZES = {
    "shnet": SHNET,
    "lavt": SWIN | dict(text_layers=2, text_width=16, text_heads=2, trained_layers=2),
    "crossvlt": SWIN | dict(text_layers=1, text_width=48, text_heads=2, head_width=16, align_width=20),
    "cmpc": CMPC_TINY,
}


def published_file(name, folder):
    "A file as its program writes it, and the other options of the command."
    if name == "shnet":
        torch.save({"epoch": 3, "state_dict": shaken(Program()).state_dict()}, folder / "shnet.pth")
        (folder / "glove.txt").write_text("".join(f"{w} {' '.join(['0.3'] * DIM)}\n" for w in WORDS))
        return folder / "shnet.pth", [
            "--vocabulary",
            word_list(folder / "w.txt"),
            "--vectors",
            folder / "glove.txt",
        ]
    if name == "cmpc":
        return saved(tensorflow_file(), folder / "cmpc.npz"), ["--vocabulary", word_list(folder / "w.txt")]
    weights = {f"module.{k}": v for k, v in swin_sizes(name).items()}
    content = {"model": weights, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=5e-5), "epoch": 39}
    torch.save(content, folder / f"{name}.pth")
    return folder / f"{name}.pth", ["--vocabulary", pieces(folder / "vocab.txt")]


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.mark.parametrize("name", ["shnet", "lavt", "crossvlt", "cmpc"])
def test_convert_then_evaluate_segment_and_explore_on_the_micro_set(name, real_data, tmp_path):
    if name in ("lavt", "crossvlt"):
        pytest.importorskip("timm")
        pytest.importorskip("transformers")
    file, options = published_file(name, tmp_path)
    for field, value in SIZES[name].items():
        options += ["--set", f"{field}={json.dumps(value)}"]
    made = invoke("convert", file, "--model", name, "--out", tmp_path / "out", *options)
    assert made.exit_code == 0, made.output
    *rows, total, where = made.output.strip().splitlines()
    content = read_published(file)
    inner = content.get("model", content.get("state_dict", content))
    keys = [k.removeprefix("module.") for k in inner] + [
        k for k in content if inner is not content and content[k] is not inner
    ]
    assert [row.split()[0] for row in rows if " missing " not in row] != [] and where.startswith("model: ")
    assert {row.split()[0] for row in rows if " missing " not in row} == set(keys)
    assert total.startswith(f"{len(keys)} keys in the file: ")
    if name == "crossvlt":
        assert not load_model(tmp_path / "out")[0].temperature.requires_grad
    data = ["--data", "refcoco", "--split-by", "micro", "--root", real_data]
    record = invoke("evaluate", tmp_path / "out", *data, "--device", "cpu", "--out", tmp_path / "r.json")
    assert record.exit_code == 0, record.output
    samples = json.loads((tmp_path / "r.json").read_text())["metrics"]["samples"]
    assert samples == 18  # sentences of val, as the set's page says
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(image)
    for command in (["segment"], ["explore", "--no-open"]):
        said = invoke(*command, image, "the red tie", "--model", tmp_path / "out")
        assert said.exit_code == 0, said.output
    assert (tmp_path / "photo.the-red-tie.mask.png").is_file()
    assert (tmp_path / "photo.the-red-tie.explorer.html").is_file()


def test_a_converted_lavt_keeps_its_cut_and_its_sentences(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    file, (_, vocabulary) = published_file("lavt", tmp_path)
    convert_published(file, "lavt", tmp_path / "out", overrides=SIZES["lavt"], vocabulary=vocabulary)
    model, words, meta = load_model(tmp_path / "out")
    assert words.protocol == "lavt" and meta["training"]["sentence"] == "raw" and meta["threshold"] == 0.5
    assert meta["converted_from"] == "lavt.pth" and model.config.max_words == 20
    theirs = torch.load(file, weights_only=False)["model"]
    assert torch.equal(
        model.gates[1][0].weight, theirs["module.backbone.layers.1.res_gate.0.weight"]
    ) and torch.equal(
        model.text.bert.embeddings.word_embeddings.weight,
        theirs["module.text_encoder.embeddings.word_embeddings.weight"],
    )


def test_a_file_of_lavt_s_first_program_has_bert_beside_the_model():
    weights, left = weights_in(
        {"model": {"module.a": torch.ones(1)}, "bert_model": {"module.b.c": torch.ones(2)}, "epoch": 1}
    )
    assert clean_weights(weights, "f").keys() == {"a", "text_encoder.b.c"} and left.keys() == {"epoch"}


def test_crossvlt_s_temperature_is_loaded_and_not_trained():
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    with torch.device("meta"):
        base = create_model("crossvlt", "base", backbone_weights="none", text_weights="none")
    assert not base.temperature.requires_grad and "temperature" in base.state_dict()
    assert all(p is not base.temperature for group in base.parameter_groups() for p in group["params"])
    assert model_config("crossvlt", "refshapes").train_temperature  # recorded runs train it


# ---- what is wrong with a file is one line


def damaged(tmp_path):
    "Files and options that nobody can convert -> words of the answer."
    torch.save({"state_dict": {"a.weight": torch.ones(3)}}, tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    nan = dict(Program().state_dict())
    nan["merge.0.bias"] = torch.full((C,), math.nan)
    torch.save(nan, tmp_path / "nan.pth")
    torch.save({"model": {"a": "text", "b": torch.ones(1)}}, tmp_path / "text.pth")
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    np.savez(tmp_path / "strange.npz", **{"text_objseg/unheard/DW": np.zeros((1, 1, 2, 2), np.float32)})
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)

    class Runs:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"model": Runs()}, tmp_path / "runs.pth")
    words, bert = word_list(tmp_path / "w.txt"), pieces(tmp_path / "vocab.txt")
    small = [x for k, v in SIZES["lavt"].items() for x in ("--set", f"{k}={v}")]
    (tmp_path / "twice.txt").write_text("dog\ndog\n")
    cmpc = saved(tensorflow_file(), tmp_path / "cmpc.npz")
    few = {k: v for k, v in tensorflow_file().items() if "W_cf" not in k}
    tiny = [x for k, v in CMPC_TINY.items() for x in ("--set", f"{k}={v}")]
    return [
        (["missing.pth", "--model", "lavt"], "missing.pth: no such file"),
        ([tmp_path, "--model", "lavt"], "no such file"),
        ([tmp_path / "other.pth", "--model", "swin"], "no published model called 'swin'"),
        ([tmp_path / "page.pth", "--model", "lavt"], "not a checkpoint that can be read safely"),
        ([tmp_path / "runs.pth", "--model", "lavt"], "read safely: it holds a print"),
        ([tmp_path / "empty.pth", "--model", "lavt"], "there are no weights in it"),
        ([tmp_path / "list.pth", "--model", "lavt"], "holds a list"),
        ([tmp_path / "other.pth", "--model", "lavt", "--vocabulary", bert, *small], "1 unknown: a.weight"),
        ([tmp_path / "other.pth", "--model", "crossvlt", "--vocabulary", bert], "1 unknown: a.weight"),
        ([tmp_path / "other.pth", "--model", "shnet", "--vocabulary", words], "1 modules instead of"),
        ([tmp_path / "nan.pth", "--model", "shnet"], "merge.0.bias has values that are not finite"),
        ([tmp_path / "text.pth", "--model", "shnet", "--vocabulary", words], "1 modules instead of"),
        ([tmp_path / "cut.npz", "--model", "cmpc", "--vocabulary", words], "not a file of arrays"),
        ([tmp_path / "objects.npz", "--model", "cmpc", "--vocabulary", words], "not a file of arrays"),
        (
            [tmp_path / "strange.npz", "--model", "cmpc", "--vocabulary", words, *tiny],
            "unheard/DW is unknown",
        ),
        (
            [tmp_path / "cut.safetensors", "--model", "lavt"],
            "cut.safetensors: not a checkpoint that can be read safely: it is damaged",
        ),
        ([cmpc, "--model", "cmpc"], "a vocabulary is needed"),
        ([cmpc, "--model", "cmpc", "--vocabulary", tmp_path / "none.txt"], "none.txt: no such file"),
        ([cmpc, "--model", "cmpc", "--vocabulary", tmp_path / "twice.txt"], "lists 'dog' twice"),
        ([cmpc, "--model", "cmpc", "--vocabulary", cmpc], "not a text file"),
        (
            [cmpc, "--model", "cmpc", "--vocabulary", tmp_path / "one.txt", *tiny],
            "has 12 words, but the vocabulary lists 3",
        ),
        (
            [saved(few, tmp_path / "few.npz"), "--model", "cmpc", "--vocabulary", words, *tiny],
            "1 missing keys",
        ),
        ([cmpc, "--model", "cmpc", "--vocabulary", words, *tiny, "--set", "grid=5"], "wrong shapes"),
        ([cmpc, "--model", "cmpc", "--vocabulary", words, "--set", "levels=5"], "no field 'levels'"),
        ([cmpc, "--model", "cmpc", "--vocabulary", words, "--preset", "huge"], "no preset called 'huge'"),
        ([cmpc, "--model", "cmpc", "--data", "refcoco"], "--data gives shnet its words"),
    ]


def test_damaged_files_and_odd_options_are_one_line(tmp_path):
    cases = damaged(tmp_path)
    (tmp_path / "one.txt").write_text("dog\n")
    for args, words in cases:
        result = invoke("convert", *args, "--out", tmp_path / "out")
        lines = result.stderr.strip().splitlines()
        assert result.exit_code == 2 and len(lines) == 1 and words in lines[0], (args, result.output)
        assert len(lines[0]) < 700 and not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_kept_unless_forced(tmp_path):
    file, words = saved(tensorflow_file(), tmp_path / "cmpc.npz"), word_list(tmp_path / "w.txt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    options = dict(overrides=CMPC_TINY, vocabulary=words)
    with pytest.raises(ExistsError, match="is there already"):
        convert_published(file, "cmpc", tmp_path / "out", **options)
    assert (tmp_path / "out" / "mine.txt").is_file()
    convert_published(file, "cmpc", tmp_path / "out", overwrite=True, **options)
    assert (tmp_path / "out" / "config.json").is_file()


def test_shnet_may_take_any_words_but_needs_their_vectors(tmp_path):
    torch.save(Program().state_dict(), tmp_path / "shnet.pth")
    words = Vocabulary.build(["the man with 2 dogs"], letters_only=True)
    with pytest.raises(InputError, match="no word vectors"):
        convert_published(
            tmp_path / "shnet.pth", "shnet", tmp_path / "out", overrides=SHNET, vocabulary=words
        )
    (tmp_path / "short.txt").write_text("man 0.1 0.2 0.3\ndogs 1 2 3\n")
    with pytest.raises(InputError, match="3 numbers a word instead of 8"):
        convert_published(
            tmp_path / "shnet.pth",
            "shnet",
            tmp_path / "out",
            overrides=SHNET,
            vocabulary=words,
            vectors=tmp_path / "short.txt",
        )
    with pytest.raises(NotFoundError):
        convert_published(tmp_path / "no.pth", "shnet", tmp_path / "out", vocabulary=words)


def test_a_list_of_words_keeps_its_order(tmp_path):
    (tmp_path / "w.txt").write_bytes(b"zebra\r\n<unk>\r\nant\r\nbee\r\n")
    vocabulary, lines = read_words(tmp_path / "w.txt")
    assert vocabulary.itos == ["<pad>", "<unk>", "zebra", "ant", "bee"] and lines == [-1, 1, 0, 2, 3]
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary
