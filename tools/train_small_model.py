"""Make a small, realistic language model for benchmarks: a Llama pruned to other widths and trained against itself.

    python tools/train_small_model.py TEACHER OUT TEXT [TEXT ...] --hidden 512 --heads 8 --seconds 300

Pretrained models small enough for a benchmark rarely have the widths that a benchmark needs, say rows of a multiple of
256 weights, and a model trained from nothing in minutes is no language model. So the student is the teacher with fewer
channels of the residual stream, as in Minitron (Muralidharan et al. 2024), found by principal components as in SliceGPT
(Ashkboos et al. 2024) and turned back towards the teacher's own channels, with fewer attention heads and layers if
wanted, and then trained: KL divergence from the teacher's predictions mixed with cross entropy, AdamW, learning rate
falling as a cosine of the clock.

TEACHER is the Hugging Face directory of a Llama (`LlamaForCausalLM`, no biases). TEXT: UTF-8, plain or .xz, a NUL
character between documents; special tokens written out in the text count as such. OUT gets weights in bfloat16, config
and tokenizer. The clock starts with the program; the model is saved when it is over, whatever was reached.
"""

import argparse
import lzma
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

STARTED = time.monotonic()
SAVING = 12.0  # seconds kept for the last validation and for writing
PIECE = 100_000  # characters that are tokenized at once
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s]", *words, flush=True)


def read_documents(files: list[Path], rng: random.Random) -> list[str]:
    """The texts in random order, long ones in pieces."""
    pieces = []
    for file in files:
        with lzma.open(file) if file.suffix == ".xz" else open(file, "rb") as handle:
            for document in handle.read().decode(errors="replace").split("\0"):
                document = document.strip("\n")
                pieces += [document[i : i + PIECE] for i in range(0, len(document), PIECE)]
    rng.shuffle(pieces)
    return pieces


def tokenize(folder: Path, documents: list[str], separator: str) -> npt.NDArray[np.int32]:
    """All tokens one after another, the token `separator` after every document."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(separator)
    if end is None:
        sys.exit(f"{folder}: no token {separator}; choose another with --separator")
    parts = []
    for first in range(0, len(documents), 1000):
        for found in tokenizer.encode_batch_fast(documents[first : first + 1000], add_special_tokens=False):
            parts.append(np.array([*found.ids, end], dtype=np.int32))
    return np.concatenate(parts)


def load_teacher(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    if teacher.config.model_type != "llama" or teacher.config.attention_bias or teacher.config.mlp_bias:
        sys.exit(f"{folder}: the teacher has to be a Llama without biases")
    return teacher.to(device).eval().requires_grad_(False)


def student_config(teacher: Any, hidden: int, heads: int, layers: int) -> Any:
    """The teacher's config with other widths. With fewer heads, each has its own key and value head: those that are
    left share them unevenly."""
    if not 0 < hidden <= teacher.hidden_size:
        sys.exit(f"--hidden {hidden}: the teacher has {teacher.hidden_size}, and channels can only be left out")
    if not 0 < heads <= teacher.num_attention_heads:
        sys.exit(f"--heads {heads}: the teacher has {teacher.num_attention_heads}, and heads can only be left out")
    if hidden % heads:
        sys.exit(f"--hidden {hidden}: no multiple of {heads} heads, which transformers asks for")
    if not 0 < layers <= teacher.num_hidden_layers:
        sys.exit(f"--layers {layers}: the teacher has {teacher.num_hidden_layers}")
    config = type(teacher).from_dict(teacher.to_dict())
    config.head_dim = teacher.head_dim
    if heads < teacher.num_attention_heads:
        config.num_key_value_heads = heads
    config.hidden_size, config.num_attention_heads, config.num_hidden_layers = hidden, heads, layers
    return config


def norms(model: Any) -> list[Any]:
    """The norms in the order in which they read the residual stream."""
    found = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    return [*found, model.model.norm]


@torch.no_grad()
def measure(teacher: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X^T X in float64 of what every norm puts out before its weight (trace 1), [norms, hidden, hidden], and of what
    the heads of every layer put out, [layers, heads * size, heads * size]. tokens: [sequences, length]."""
    outs = [layer.self_attn.o_proj for layer in teacher.model.layers]
    readers = [*norms(teacher), *outs]
    sums = [torch.zeros(2 * (m.weight.shape[-1],), dtype=torch.float64, device=tokens.device) for m in readers]

    def hook(total: torch.Tensor) -> Any:
        def add(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, len(total)).float()
            if module.weight.dim() == 1:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
            total.add_((x.T @ x).double())

        return add

    hooks = [module.register_forward_pre_hook(hook(total)) for module, total in zip(readers, sums, strict=True)]
    for batch in tokens.split(8):
        teacher.model(batch, use_cache=False)
    for handle in hooks:
        handle.remove()
    channels, heads = torch.stack(sums[: -len(outs)]), torch.stack(sums[-len(outs) :])
    return channels / channels.diagonal(dim1=1, dim2=2).sum(1)[:, None, None], heads


def chosen_heads(out: torch.Tensor, products: torch.Tensor, heads: int, size: int) -> tuple[list[int], torch.Tensor]:
    """The `heads` heads that stand in best for all, and the weight [hidden, heads * size] with which they do so.

    out: [hidden, all heads * size]; products: X^T X of its inputs. Heads go one by one, each time the one whose part
    the others can make up for best in the sense of least squares.
    """
    left = list(range(out.shape[1] // size))
    products = products + 1e-4 * products.diagonal().mean() * torch.eye(len(products)).to(products)

    def fitted(kept: list[int]) -> tuple[float, torch.Tensor]:
        """What of the output's squares the kept heads explain, and their weight."""
        columns = torch.tensor([size * head + i for head in kept for i in range(size)], device=out.device)
        wanted = out @ products[:, columns]
        weight = torch.linalg.solve(products[columns][:, columns], wanted.T).T
        return float((weight * wanted).sum()), weight

    while len(left) > heads:
        left = max(([h for h in left if h != gone] for gone in left), key=lambda kept: fitted(kept)[0])
    return left, fitted(left)[1] if len(left) * size < out.shape[1] else out


def channel_basis(products: torch.Tensor, hidden: int) -> torch.Tensor:
    """[teacher's hidden, hidden], columns orthonormal: the space of the first principal components, and in it the
    axes closest to those channels of the teacher that hold most."""
    mean = products.mean(0)
    space = torch.linalg.eigh(mean).eigenvectors[:, -hidden:]
    kept = mean.diagonal().topk(hidden).indices.sort().values
    left, _, right = torch.linalg.svd(space[kept].T)
    return space @ left @ right


@torch.no_grad()
def pruned_student(teacher: Any, config: Any, products: torch.Tensor, head_products: torch.Tensor) -> Any:
    """A model of `config` in float32 that predicts nearly what the teacher does, if little is left out.

    products, head_products: from `measure`.
    """
    from transformers import LlamaForCausalLM

    basis = channel_basis(products, config.hidden_size)
    device = basis.device
    student = LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="sdpa").to(device)
    size, keys = config.head_dim, config.num_key_value_heads
    group = teacher.config.num_attention_heads // teacher.config.num_key_value_heads
    chosen = [round(i) for i in np.linspace(0, teacher.config.num_hidden_layers - 1, config.num_hidden_layers)]

    def reader(norm: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's weight for a norm, and what turns the weights of its readers, [teacher's hidden, hidden]."""
        gain = norm.weight.double()
        share = torch.einsum("ik,ij,jk->", basis, products[number], basis)  # of the squares that the student keeps
        new = (basis.square().T @ gain.square()).sqrt()
        scale = (share * basis.shape[0] / basis.shape[1]).sqrt()  # norms divide by the mean over all channels
        return new, gain[:, None] * basis * scale / new

    inner = student.model
    inner.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight.double() @ basis)
    for layer, number in zip(inner.layers, chosen, strict=True):
        old = teacher.model.layers[number]
        gain, turn = reader(old.input_layernorm, 2 * number)
        layer.input_layernorm.weight.copy_(gain)
        heads, out = chosen_heads(
            old.self_attn.o_proj.weight.double(), head_products[number], config.num_attention_heads, size
        )
        key_heads = [head // group for head in heads] if keys == len(heads) else list(range(keys))
        for name, taken in (("q_proj", heads), ("k_proj", key_heads), ("v_proj", key_heads)):
            rows = getattr(old.self_attn, name).weight.double().view(-1, size, basis.shape[0])[taken].flatten(0, 1)
            getattr(layer.self_attn, name).weight.copy_(rows @ turn)
        layer.self_attn.o_proj.weight.copy_(basis.T @ out)
        gain, turn = reader(old.post_attention_layernorm, 2 * number + 1)
        layer.post_attention_layernorm.weight.copy_(gain)
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).weight.copy_(getattr(old.mlp, name).weight.double() @ turn)
        layer.mlp.down_proj.weight.copy_(basis.T @ old.mlp.down_proj.weight.double())
    gain, turn = reader(teacher.model.norm, -1)
    head = teacher.lm_head.weight.double() @ turn
    if config.tie_word_embeddings:  # the head's rows are the embeddings': the gain takes what it can
        embeddings = inner.embed_tokens.weight.double()
        gain = gain * (head * embeddings).sum(0) / embeddings.square().sum(0)
    else:
        student.lm_head.weight.copy_(head)
    inner.norm.weight.copy_(gain)
    return student


def distillation(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, text: float) -> Any:
    """For logits [tokens, vocabulary] in float32 and the tokens that follow: sums over tokens of the KL divergence from
    the teacher and of the cross entropy, and the gradient of (1 - text) times the one plus text times the other."""
    own, wanted = functional.log_softmax(student, -1), functional.log_softmax(teacher, -1)
    target = wanted.exp()
    kl = (target * (wanted - own)).sum()
    entropy = -own.gather(1, targets[:, None]).sum()
    gradient = own.exp() - (1 - text) * target
    return kl, entropy, gradient.scatter_add(1, targets[:, None], gradient.new_full((len(targets), 1), -text))


class Loss(torch.autograd.Function):
    """Mean loss of all tokens; logits exist for `chunk` tokens at a time, and gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        targets: torch.Tensor,
        text: float,
        chunk: int,
        step: Any,
    ) -> Any:
        low = teacher_hidden.dtype
        x, w = hidden.to(low), head.to(low)
        x_grad, w_grad = torch.empty_like(x), torch.zeros_like(head)
        kl_sum = entropy_sum = 0
        with torch.autocast(hidden.device.type, enabled=False):
            for part in (slice(i, i + chunk) for i in range(0, len(x), chunk)):
                logits, wanted = (x[part] @ w.T).float(), (teacher_hidden[part] @ teacher_head.T).float()
                kl, entropy, gradient = step(logits, wanted, targets[part], text)
                gradient = (gradient / len(x)).to(low)
                x_grad[part] = gradient @ w
                w_grad += gradient.T @ x[part]
                kl_sum, entropy_sum = kl_sum + kl, entropy_sum + entropy
        ctx.save_for_backward(x_grad.to(hidden.dtype), w_grad)
        kl, entropy = kl_sum / len(x), entropy_sum / len(x)
        ctx.mark_non_differentiable(kl, entropy)
        return (1 - text) * kl + text * entropy, kl, entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        x_grad, w_grad = ctx.saved_tensors
        return x_grad * grad, w_grad * grad, None, None, None, None, None, None


class Training:
    """A student, its teacher, and windows of tokens on one device."""

    def __init__(self, student: Any, teacher: Any, windows: torch.Tensor, options: argparse.Namespace) -> None:
        self.student, self.teacher, self.options = student, teacher, options
        held = min(options.held_out, len(windows) // 10)
        self.held, self.windows = windows[:held], windows[held:]
        self.step: Any = distillation
        self.order = torch.empty(0, dtype=torch.long)

    def compile(self) -> None:
        """One layer of each model is compiled, the others use the same code."""
        for layer in (*self.student.model.layers, *self.teacher.model.layers):
            layer.compile(dynamic=False)
        self.step = torch.compile(distillation, dynamic=False)

    def losses(self, windows: torch.Tensor) -> Any:
        """(loss, KL divergence, cross entropy) of windows [sequences, length + 1]."""
        inputs, targets = windows[:, :-1], windows[:, 1:].reshape(-1)
        with torch.no_grad():
            wanted = self.teacher.model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.device.type == "cuda"):
            found = self.student.model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        head, options = self.student.lm_head.weight, self.options
        return Loss.apply(
            found, head, wanted, self.teacher.lm_head.weight, targets, options.text, options.chunk, self.step
        )

    @torch.no_grad()
    def validate(self, name: str) -> None:
        """Say the losses of the windows held out, if there are any."""
        if not len(self.held):
            return
        batches = [b for b in self.held.split(self.options.batch) if len(b) == self.options.batch] or [self.held]
        with torch.compiler.set_stance("force_eager"):  # a few batches do not repay a compilation without gradients
            found = torch.stack([torch.stack(self.losses(batch)) for batch in batches]).mean(0).tolist()
        say(f"{name}: held-out cross entropy {found[2]:.4f}, KL divergence from the teacher {found[1]:.4f}")

    def batch(self) -> torch.Tensor:
        """The next windows; each comes once before any comes again."""
        size = self.options.batch
        if len(self.order) < size:
            self.order = torch.cat([self.order, torch.randperm(len(self.windows))])
        taken, self.order = self.order[:size], self.order[size:]
        return self.windows[taken.to(self.windows.device)]

    def run(self, until: float) -> None:
        """Train until the clock (time.monotonic()) says `until`."""
        options, parameters = self.options, list(self.student.parameters())
        fused = parameters[0].device.type == "cuda"
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
        size = options.batch * options.length
        first = shown = time.monotonic()
        steps = steps_shown = 0
        while (now := time.monotonic()) < until:
            if steps == options.warm_up:  # what was compiled on the way is no part of the schedule
                first = now
            part = (now - first) / (until - first) if steps >= options.warm_up else 0.0
            rising = min(1.0, (steps + 1) / max(1, options.warm_up))
            rate = options.rate * 0.5 * (1 + math.cos(math.pi * part)) * rising
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, kl, entropy = self.losses(self.batch())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
            # Reading a loss waits for the device, without which the clock would run ahead of the work.
            if steps % 10 == 0 or steps <= options.warm_up or not fused:
                values = [float(v) for v in (kl, entropy, norm)]
                if not all(map(math.isfinite, values)):
                    sys.exit(f"step {steps}: loss or gradient is not a number; take a smaller --rate")
                now = time.monotonic()
                if now - shown >= 5 or steps in (1, 2):
                    speed = size * (steps - steps_shown) / (now - shown)
                    say(
                        f"step {steps}: KL divergence {values[0]:.4f}, cross entropy {values[1]:.4f}, gradient "
                        f"{values[2]:.3f}, rate {rate:.2e}, {speed:,.0f} tokens/s"
                    )
                    shown, steps_shown = now, steps
        say(f"{steps} steps, {steps * size / 1e6:.1f} M tokens, {steps * options.batch / len(self.windows):.2f} epochs")


def save(student: Any, teacher_folder: Path, out: Path) -> None:
    """A Hugging Face directory; `out` appears whole or not at all."""
    temporary = out.with_name(f"{out.name}.part{os.getpid()}")
    student.to(torch.bfloat16).save_pretrained(temporary)
    for name in TOKENIZER_FILES:
        if (teacher_folder / name).exists():
            shutil.copyfile(teacher_folder / name, temporary / name)
    card = f"Made for benchmarks by train_small_model.py out of {teacher_folder.name}, whose license holds.\n"
    (temporary / "README.md").write_text(f"# {out.name}\n\n{card}")
    temporary.rename(out)


def at_least(least: int) -> Callable[[str], int]:
    """What argparse makes a number of."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--separator", default="<|endoftext|>", help="token after every document")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, help="attention heads (default: the teacher's)")
    parser.add_argument("--layers", type=int, help="evenly chosen (default: all)")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything, from the start of the program")
    parser.add_argument("--length", type=at_least(1), default=1024, help="tokens of a window")
    parser.add_argument("--batch", type=at_least(1), default=32, help="windows a step")
    parser.add_argument("--rate", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument("--warm-up", type=at_least(0), default=50, help="steps")
    parser.add_argument(
        "--text", type=float, default=0.1, help="weight of the cross entropy; 1 less it is the teacher's"
    )
    parser.add_argument("--chunk", type=at_least(1), default=8192, help="tokens whose logits are held at a time")
    parser.add_argument("--sample", type=at_least(1), default=128, help="windows for the principal components")
    parser.add_argument("--held-out", type=at_least(0), default=128, help="windows for validation (0: none)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.out.exists():
        sys.exit(f"{options.out} exists")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(options.teacher, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    say(f"teacher: {sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M weights, on {device}")
    documents = read_documents(options.texts, random.Random(options.seed))
    tokens = tokenize(options.teacher, documents, options.separator)
    say(
        f"{sum(map(len, documents)) / 1e6:.1f} M characters in {len(documents)} documents, "
        f"{len(tokens) / 1e6:.1f} M tokens"
    )
    count = (len(tokens) - 1) // options.length
    if count < 10 * options.batch // 9 + 1:
        sys.exit("too little text for a batch")
    # Neighbours share a token, the target of the one and the first input of the other.
    starts = torch.randperm(count)[:, None] * options.length + torch.arange(options.length + 1)
    windows = torch.from_numpy(tokens)[starts].long().to(device)
    about = teacher.config
    config = student_config(
        about, options.hidden, options.heads or about.num_attention_heads, options.layers or about.num_hidden_layers
    )
    student = pruned_student(teacher, config, *measure(teacher, windows[-options.sample :, :-1]))
    say(f"student: {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M weights")
    training = Training(student, teacher, windows, options)
    if not options.eager:
        training.compile()
    training.validate("before training")
    training.run(STARTED + options.seconds - SAVING)
    training.validate("after training")
    save(student, options.teacher, options.out)
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
