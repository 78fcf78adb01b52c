"""The tables of docs/operations.md, "Sizing", from the server's own accounting: what it says that a prompt needs, and its
held cache. With --print the tables as the page has them."""
import itertools
import re
import sys
import unittest

from served import SOURCE, Server

MODELS = ('llama-3.1-8b', 'llama-3.1-70b', 'qwen2.5-7b', 'deepseek-v3')
TOKENS = (8192, 32768, 131072, 1000000)
MIB, GIB = 2 ** 20, 2 ** 30
# Of the overlay k8s/overlays/gpu, which the test reads.
GPU_SIZES = SOURCE / 'k8s/overlays/gpu/sizes.yaml'
MAX_SESSIONS = 256  # the server's default
COMPUTED_AT_ONCE = 4  # prompts of each GPU
# KV heads, key dimension, query heads.
SHAPES = {'llama-3.1-8b': (8, 128, 32), 'llama-3.1-70b': (8, 128, 64), 'qwen2.5-7b': (4, 128, 28), 'deepseek-v3': (1, 576, 128)}
GPU_ROW = re.compile(r'^\| ([\w.-]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) MiB \|$', re.MULTILINE)
ROW = re.compile(r'^\| ([\w.-]+) \| ([\d,]+) \| ([\d,]+) MiB \| ([\d.]+) \| ([\d,]+) \| ([\d,]+) MiB \|$', re.MULTILINE)


def needed(server, model, tokens, *words):
    """Bytes, which a server that has no such room says when it refuses the prompt."""
    text = server.run('bench', '--geometry', model, '--tokens', tokens, '--prompts', 1, *words, fails=True)
    return int(re.search(r'the prompt needs (\d+) bytes of memory; the whole budget is', text).group(1))


def rows():
    """Model, tokens, bytes reserved, bytes held."""
    with Server('--memory-budget', '1MiB') as small, Server('--memory-budget', '64GiB', '--hold-budget', '4KiB') as holds:
        for model, tokens in itertools.product(MODELS, TOKENS):
            yield model, tokens, needed(small, model, tokens), needed(holds, model, tokens, '--hold')


def gpu_sizes():
    """The overlay's budgets, in bytes."""
    found = dict(re.findall(r'name: STRUCTKV_(\w+), value: (\d+)GiB', GPU_SIZES.read_text()))
    return {name: int(found[name]) * GIB for name in ('DEVICE_MEMORY', 'MEMORY_BUDGET', 'HOLD_BUDGET')}


def layers_on_the_gpu(model, tokens):
    """Bytes of as many layers as a GPU computes at once, by the page's "GPUs": keys, saliency, and of each row of the window 2.5 bytes."""
    kv_heads, dim, query_heads = SHAPES[model]
    return COMPUTED_AT_ONCE * tokens * (kv_heads * dim * 2 + kv_heads * 4 + 4 + 2.5 * 8 * query_heads)


def gpu_rows():
    """Model, tokens, prompts and tokens of a GPU at a time, caches held, bytes of the GPU's memory."""
    sizes = gpu_sizes()
    for model, tokens, reserved, held in rows():
        prompts = min(MAX_SESSIONS, sizes['MEMORY_BUDGET'] // reserved)
        yield model, tokens, prompts, prompts * tokens, sizes['HOLD_BUDGET'] // held, layers_on_the_gpu(model, tokens)


class SizingTest(unittest.TestCase):
    def test_the_page_has_what_a_gpu_of_the_overlay_takes(self):
        page = (SOURCE / 'docs/operations.md').read_text()
        table = {(model, int(tokens.replace(',', ''))): [float(cell.replace(',', '')) for cell in cells]
                 for model, tokens, *cells in GPU_ROW.findall(page)}
        self.assertEqual(set(table), set(itertools.product(MODELS, TOKENS)))
        for model, tokens, prompts, _, held, device in gpu_rows():
            cells = table[model, tokens]
            # Whole prompts and caches; of other instruction sets the room for computing differs a little.
            for cell, value in zip((cells[0], *cells[2:]), (prompts, held, device / MIB)):
                self.assertLessEqual(abs(cell - value), max(1, 0.06 * value), f'{model}, {tokens}: {value}')
            self.assertEqual(cells[1], cells[0] * tokens)
            self.assertLessEqual(device, gpu_sizes()['DEVICE_MEMORY'], 'fewer than four prompts are computed at once')

    def test_the_page_has_what_the_server_says(self):
        page = (SOURCE / 'docs/operations.md').read_text()
        table = {(model, int(tokens.replace(',', ''))): [float(cell.replace(',', '')) for cell in cells]
                 for model, tokens, *cells in ROW.findall(page)}
        self.assertEqual(set(table), set(itertools.product(MODELS, TOKENS)))
        for model, tokens, reserved, held in rows():
            # Of other instruction sets the room for computing differs a little.
            for cell, value in zip(table[model, tokens], (reserved / MIB, GIB / reserved, GIB / reserved * tokens, held / MIB)):
                self.assertAlmostEqual(cell / value, 1, delta=0.06, msg=f'{model}, {tokens}: {value}')


if __name__ == '__main__':
    if '--print' in sys.argv:
        for model, tokens, reserved, held in rows():
            print(f'| {model} | {tokens:,} | {reserved / MIB:,.0f} MiB | {GIB / reserved:.2f} | '
                  f'{round(GIB / reserved * tokens, -3):,.0f} | {held / MIB:,.0f} MiB |')
        print()
        for model, tokens, prompts, together, held, device in gpu_rows():
            print(f'| {model} | {tokens:,} | {prompts:,} | {together:,} | {held:,} | {device / MIB:,.0f} MiB |')
    else:
        unittest.main()
