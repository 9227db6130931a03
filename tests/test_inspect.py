"""`sdprune inspect` against models that run: what it says without weights holds with them."""

import json
import re
import shutil
import subprocess
import sys
import threading
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature

import diffusers
import full_size
import pytest
import tiny_families
import torch
from command_lines import fit
from safetensors.torch import load_file

from sdprune import pipelines
from sdprune.calibration.progress import size_shown
from sdprune.pipelines import Sampling

PROMPTS = [["a red star"], ["two blue cats"]]
SIDE = 32
IN_VAIN = {
    "StableDiffusion3": ["transformer_blocks.2.attn.add_q_proj"],
    "QwenImage": ["transformer_blocks.2.attn.add_q_proj"],
}
"""Layers of the last block whose outputs go into a tensor that is read in another part: nothing shows that."""


@pytest.fixture(scope="module", params=tiny_families.FAMILIES)
def family(request, tmp_path_factory):
    """(name, directory, a copy that has configurations alone)"""
    directory = tiny_families.save(request.param, tmp_path_factory.mktemp(request.param))
    bare = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(directory, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    return request.param, directory, bare


def loaded(name, directory):
    model = getattr(pipelines, name)(str(directory))
    model.load(torch.float32, torch.device("cpu"))
    return model


def facts_of(sdprune, *arguments):
    told = sdprune("inspect", *arguments, "--json")
    assert (told.code, told.err) == (0, ""), told.err
    return json.loads(told.out)


def latents(model, prompts=("a red star",), seed=3, steps=1, guidance=1):
    return model.generate(list(prompts), [seed], Sampling(steps, guidance, SIDE, SIDE), decode=False).images


def test_only_what_no_output_depends_on_can_be_zeroed_unseen(sdprune, family):
    """What is named, all at once, then block by block what is not, and in last blocks layer by layer."""
    name, directory, bare = family
    facts, model = facts_of(sdprune, bare), loaded(name, directory)
    dense = latents(model)
    for component, entry in facts["components"].items():
        if entry["role"] is None:
            continue
        module, unread = model.components[component], set()
        for inner in entry["unread"]["modules"]:
            unread |= {f"{inner}.{one}" for one, _ in module.get_submodule(inner).named_parameters()}
        parameters = dict(module.named_parameters())
        assert sum(parameters[one].numel() for one in unread) == entry["unread"]["parameters"]
        for one in unread:
            parameters[one].zero_()
        assert torch.equal(latents(model), dense), component
        blocks = [block["name"] for block in entry["blocks"] if block["name"] != "stem"]
        read = {one: value for one, value in parameters.items() if one not in unread and value.dim() > 1}
        groups = [[value for one, value in read.items() if one.startswith(f"{block}.")] for block in blocks]
        last = {one: value for one, value in read.items() if one.startswith(f"{blocks[-1]}.")}
        vain = [f"{one}.weight" for one in IN_VAIN.get(name, ())]
        for group in [*groups, *([value] for one, value in last.items() if one not in vain)]:
            kept = [value.clone() for value in group]
            for value in group:
                value.zero_()
            assert not torch.equal(latents(model), dense)
            for value, before in zip(group, kept, strict=True):
                value.copy_(before)


def test_layers_that_a_family_leaves_out_are_proved_to_be_without_effect(sdprune, family):
    name, directory, _ = family
    facts, model = facts_of(sdprune, directory), getattr(pipelines, name)(str(directory))
    own = getattr(diffusers, model.pipeline).__call__
    assert facts["steps"] == signature(own).parameters["num_inference_steps"].default
    for component, part in model.prunable.items():
        module, entry = part.meta_module(), facts["components"][component]
        proved = [*entry["unread"]["modules"], *IN_VAIN.get(name, ())]
        tied = [one.removesuffix(".weight") for names in entry["tied"] for one in names]
        assert entry["idle"]["layers"] == (IN_VAIN.get(name, []) if component == model.denoiser else [])
        for pattern in part.idle(["Linear", "Conv2d"]):
            for layer, one in module.named_modules():
                if isinstance(one, (torch.nn.Linear, torch.nn.Conv2d)) and fnmatchcase(layer, pattern):
                    assert layer in tied or any(f"{layer}.".startswith(f"{inner}.") for inner in proved), layer


def test_sdxl_reads_neither_its_first_encoders_last_layer_nor_its_final_norm(sdprune, tmp_path):
    facts = facts_of(sdprune, tiny_families.save("StableDiffusionXL", tmp_path))
    unread = {name: one["unread"]["modules"] for name, one in facts["components"].items() if one["role"]}
    assert unread == {"text_encoder": ["encoder.layers.2", "final_layer_norm"], "text_encoder_2": [], "unet": []}


def test_inputs_that_depend_on_the_timestep_or_the_text_alone_are_equal_where_the_others_differ(sdprune, family):
    """Seen in runs of two prompts with two noises, step by step."""
    name, directory, bare = family
    model = loaded(name, directory)
    denoiser = model.components[model.denoiser]
    layers = {one: layer for one, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear)}
    for one, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, one=one: runs[-1].setdefault(one, []).append(args[0].clone()))
    runs = []
    for number, prompts in enumerate(PROMPTS):
        runs.append({})
        latents(model, prompts, number, steps=3)
    seen = {one: [run[one] for run in runs] for one in layers if one in runs[0]}
    by_step = {one for one, (a, b) in seen.items() if all(map(torch.equal, a, b))}
    by_text = {one for one, (a, b) in seen.items() if all(torch.equal(a[0], x) for x in a)} - by_step
    inputs = facts_of(sdprune, bare)["components"][model.denoiser]["inputs"]
    assert set(inputs["timestep_alone"]["layers"]) == by_step
    assert set(inputs["text_alone"]["layers"]) == by_text
    assert inputs["timestep_alone"]["weights"] == sum(layers[one].weight.numel() for one in by_step)


def test_sizes_are_those_of_the_files_and_blocks_run_in_this_order(sdprune, family):
    name, directory, bare = family
    facts, model = facts_of(sdprune, directory), loaded(name, directory)
    total = 0
    for component, entry in facts["components"].items():
        (file,) = (directory / component).glob("*.safetensors")
        tensors, module = load_file(file), model.components[component]
        numbers = sum(value.numel() for value in tensors.values())
        buffers = sum(value.numel() for key, value in module.named_buffers() if key in tensors)
        assert entry["parameters"] == numbers - buffers
        assert entry["stored"] == {"bytes": file.stat().st_size, "numbers": {"F32": numbers}}
        total += entry["parameters"]
        if entry["role"] is None:
            continue
        assert sum(kind["parameters"] for kind in entry["kinds"].values()) == numbers - buffers
        ran = []
        embeddings = {id(one.weight) for one in module.modules() if isinstance(one, torch.nn.Embedding)}
        weights = [
            one.weight.numel()
            for layer, one in module.named_modules()
            if isinstance(one, torch.nn.Linear) and id(one.weight) not in embeddings
            and not any(f"{layer}.".startswith(f"{inner}.") for inner in entry["unread"]["modules"])
            and layer not in entry["idle"]["layers"]
        ]  # fmt: skip
        assert len(weights) == sum(block["layers"] for block in entry["blocks"])
        assert sum(weights) == sum(block["weights"] for block in entry["blocks"])
        blocks = [block["name"] for block in entry["blocks"] if block["name"] != "stem" and block["runs"]]
        for block in blocks:
            module.get_submodule(block).register_forward_pre_hook(lambda *_, block=block, ran=ran: ran.append(block))
        latents(model)
        assert list(dict.fromkeys(ran)) == blocks
    assert facts["parameters"] == total
    bare_facts = facts_of(sdprune, bare)
    assert all(entry.pop("stored") is None for entry in bare_facts["components"].values())
    for entry in facts["components"].values():
        del entry["stored"]
    assert bare_facts | {"model": ""} == facts | {"model": ""}


@pytest.mark.parametrize("name", ["miniature", "StableDiffusion3"])
def test_what_would_be_left_is_what_fit_leaves(sdprune, miniature, tmp_path, tmp_path_factory, name):
    """The second one has a layer that its family leaves out."""
    directory = name if name == "miniature" else tiny_families.save(name, tmp_path_factory.mktemp(name))
    family = getattr(pipelines, "StableDiffusion" if name == "miniature" else name)(str(directory))
    sparsities, words = (
        {one: 0.6 if one == family.denoiser else 0.3 for one in family.prunable},
        ["--sparsity=text=0.3"],
    )
    facts = facts_of(sdprune, directory, *words, f"--sparsity={family.denoiser}=0.6", "--layers=Linear,Conv2d")
    options = [f"--model.pipeline={type(family).__name__}", f"--model.pipeline.model={directory}", "--model.prune={}"]
    for one, sparsity in sparsities.items():
        kinds = [kind for kind in ("Linear", "Conv2d") if kind in facts["components"][one]["kinds"]]
        options.append(f"--model.prune.{one}={{sparsity: {sparsity}, layers: [{', '.join(kinds)}]}}")
    assert sdprune(*fit("prune", tmp_path, *options)).code == 0
    (report,) = tmp_path.glob("pruned-*/pruning_report.json")
    sparsity = json.loads(report.read_text())["sparsity"]
    pruned = facts["pruned"]
    assert (pruned["pruned"], pruned["parameters"]) == tuple(
        sparsity["prunable"][one] for one in ("pruned", "parameters")
    )
    assert (pruned["nominal"], pruned["actual"]) == (sparsity["nominal"], sparsity["prunable"]["pruned_fraction"])
    for name, one in pruned["components"].items():
        assert one["pruned"] == sparsity["components"][name]["pruned"]


@pytest.mark.parametrize("order", ["one_pass", "sequential"])
def test_passes_and_bytes_are_those_of_a_calibration(sdprune, miniature, tmp_path, order):
    facts = facts_of(sdprune, "miniature", "--memory=0.008", "--steps=2", "--captions=5")
    cost = facts["components"]["unet"]["criteria"]["SparseGPT"]
    options = ["--model.prune={unet: {sparsity: 0.5, criterion: SparseGPT, order: %s}}" % order]  # noqa: UP031
    options += ["--model.calibration.hessian_gib=0.008", "--model.calibration.latents=dense"]
    options.append("--data.calibration_batch_size=1")
    told = sdprune(*fit("prune", tmp_path, *options))
    assert (told.code, told.err) == (0, "")
    assert f"keeps up to {size_shown(cost[order]['kept'])} in a file" in told.out
    files = list((tmp_path / "statistics").glob("unet-hessian-*/*.safetensors"))
    assert cost[order]["passes"] == len(files)
    hessians = [{key: value.nbytes for key, value in load_file(file).items()} for file in files]
    assert cost["bytes"] == sum(sum(one.values()) for one in hessians)
    assert cost[order]["memory"] == 2 * max(sum(one.values()) for one in hessians)


def test_tables_say_what_the_json_says(sdprune, family, tmp_path):
    _, directory, _ = family
    told = sdprune("inspect", directory, f"--out={tmp_path / 'facts.json'}")
    assert (told.code, told.err) == (0, "")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == facts_of(sdprune, directory)
    for name, entry in facts["components"].items():
        assert name in told.out
        assert entry["class"] in told.out
        if entry["role"]:
            assert f"{name}: {len(entry['blocks'])} blocks in the order in which they run" in told.out
            assert all(one in told.out for one in entry["unread"]["modules"])
    assert f"{facts['pruned']['actual']:.2%}" in told.out
    assert max(map(len, sdprune("inspect", "--help").out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [  # of the published models
        (
            "StableDiffusion",
            {"text_encoder": 340_387_840, "unet": 865_910_724},
            "24 layers see the timestep alone (9.2%",
        ),
        ("Flux", {"text_encoder_2": 4_762_310_656, "transformer": 11_901_408_320}, "58 blocks in the order in which"),
        (
            "QwenImage",
            {"text_encoder": 8_292_166_656, "transformer": 20_430_401_088},
            "123 layers see the timestep alone",
        ),
    ],
)
def test_a_model_in_full_size_takes_seconds_and_little_memory(tmp_path, name, parameters, said):
    full_size.save_configuration(name, tmp_path)
    code = (
        "import json, resource, sys\nfrom sdprune.__main__ import main\n"
        f"code = main(['inspect', {str(tmp_path)!r}, '--out', {str(tmp_path / 'facts.json')!r}])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    exit_code, seconds, kilobytes = json.loads(done.stdout.splitlines()[-1])
    assert (exit_code, done.stderr) == (0, "")
    assert seconds < 20  # 5 to 8 on a free core
    assert kilobytes < 2e6
    assert said in done.stdout
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert {part: facts["components"][part]["parameters"] for part in parameters} == parameters


def test_a_reader_that_has_enough_is_no_failure(miniature):
    words = [sys.executable, "-m", "sdprune", "inspect", "miniature", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert (running.stderr.read(), running.wait()) == ("", 0)


# --- what is wrong ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(miniature, tmp_path):
    """A copy of the miniature that may be damaged."""
    return shutil.copytree(miniature / "pipeline", tmp_path / "model")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "Model directory 'nowhere' does not exist: give a diffusers directory or a hub id."),
        (["miniature", "--sparsity=unett=0.3"], "Unknown component or role 'unett'. Did you mean 'unet'?"),
        (
            ["miniature", "--sparsity=unet=3"],
            "--sparsity: unet is 3.0: give a share between 0 and 1; for 3 %, write 0.03",
        ),
        (["miniature", "--sparsity=half"], "--sparsity: 'half' is no NAME=SHARE, as in unet=0.35"),
        (["miniature", "--layers=Linear,Conv"], "--layers: Unknown kind of layer 'Conv'. Did you mean 'Conv2d'?"),
        (["miniature", "--memory=0"], "--memory: '0' is no number above 0"),
        (["miniature", "--precision=17"], "--precision: invalid choice: '17'"),
        (["miniature", "--steps=none"], "--steps: 'none' is no number of 1 or more"),
        (["miniature", "--jsn"], "Unknown option of sdprune inspect '--jsn'. Did you mean '--json'?"),
        (["miniature", "--pipeline=Flx"], "Unknown pipeline 'Flx'"),
        (["miniature", "--out=/proc/nothing/facts.json"], "Choose another --out."),
    ],
)
def test_wrong_words_are_one_line(sdprune, words, said):
    told = sdprune("inspect", *words)
    assert (told.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert said in told.err


def damaged(copy, file, **changes):
    values = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(values | changes))


def test_a_model_of_no_family_names_the_families(sdprune, copy):
    damaged(copy, "model_index.json", _class_name="AudioLDMPipeline")
    told = sdprune("inspect", copy)
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "names 'AudioLDMPipeline', which no family is for. Give a " in told.err
    named = re.search(r"Give a (.+?)(?:,|\.$| that)", told.err.strip())[1].split(" or ")
    assert {getattr(pipelines, name).pipeline for name in tiny_families.FAMILIES} <= set(named)


def test_parts_that_do_not_fit_each_other_are_one_line(sdprune, copy):
    damaged(copy, "unet/config.json", cross_attention_dim=8)
    told = sdprune("inspect", copy)
    assert (told.code, told.err.count("\n")) == (2, 1)


def test_a_family_of_ones_own_is_named_by_its_path(sdprune, copy, tmp_path, monkeypatch):
    (tmp_path / "own_family.py").write_text(
        "from sdprune.pipelines import StableDiffusion\n\n\nclass Mine(StableDiffusion):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    assert facts_of(sdprune, copy, "--pipeline=own_family.Mine")["family"] == "Mine"
    sys.modules.pop("own_family")


def test_of_a_hub_id_no_weights_are_fetched(sdprune, miniature, tmp_path, monkeypatch):
    """A hub on this machine, which notes what it is asked for."""
    root, commit, asked = miniature / "pipeline", "0123456789" * 4, []
    sizes = {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            name = self.path.partition(f"/resolve/{commit}/")[2]
            listing = {"id": "some/model", "sha": commit, "siblings": [{"rfilename": one} for one in sizes]}
            tree = [{"type": "file", "path": one, "size": size, "oid": one} for one, size in sizes.items()]
            found = json.dumps(tree if "/tree/" in self.path else listing).encode()
            content = (root / name).read_bytes() if name else found
            self.send_response(200)
            for key, value in {"X-Repo-Commit": commit, "ETag": f'"{name}"', "Content-Length": len(content)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    facts = facts_of(sdprune, "some/model")
    server.shutdown()
    own = facts_of(sdprune, "miniature")
    assert facts["pruned"] == own["pruned"]
    assert any("unet/config.json" in path for path in asked)
    assert not any("safetensors" in path for path in asked)
