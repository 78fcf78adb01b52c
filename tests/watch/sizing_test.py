"""The table of docs/operations.md, "Sizing", from the server's own accounting: what it says that a prompt needs, and its
held cache. With --print the table as the page has it."""
import itertools
import re
import sys
import unittest

from served import SOURCE, Server

MODELS = ('llama-3.1-8b', 'llama-3.1-70b', 'qwen2.5-7b', 'deepseek-v3')
TOKENS = (8192, 32768, 131072, 1000000)
MIB, GIB = 2 ** 20, 2 ** 30
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


class SizingTest(unittest.TestCase):
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
    else:
        unittest.main()
