"""The status page in headless Chromium, of a real server that prompts were sent to."""
import math
import os
import unittest

from browser import Browser, Keys
from served import Server, eventually, prompt_on_its_way

SERIES = ('entropy', 'sparsity', 'variance', 'transition')

# Of the picture that is open first: the drawn lines' points, the pivot's mark, and the strip's opacity at its pixels.
PICTURE = '''
const body = document.querySelector('details[open] .picture'), svg = body.querySelector('svg');
const canvas = body.querySelector('canvas'), copy = new OffscreenCanvas(canvas.width, canvas.height), rows = [];
const c = copy.getContext('2d', {willReadFrequently: true});
c.drawImage(canvas, 0, 0);
for (let y = 0; y < canvas.height; ++y) {
  const pixels = c.getImageData(0, y, canvas.width, 1).data;
  rows.push([...Array(canvas.width).keys()].map((x) => pixels[4 * x + 3]));
}
return {lines: [...svg.querySelectorAll('path')].map((path) => path.getAttribute('d')),
        width: svg.viewBox.baseVal.width, mark: svg.querySelector('line').getAttribute('x1'),
        pivot: svg.querySelector('text').textContent, legend: [...body.querySelectorAll('.legend span')].map((span) => span.innerText),
        text: body.innerText, rows, height: canvas.getBoundingClientRect().height};
'''


def points(path):
    return [tuple(map(float, point.split())) for point in path[1:].split('L')]


class StatusPageTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)
        # Of tests that change nothing; others have their own.
        cls.server = cls.enterClassContext(Server('--hold-budget', '64MiB', '--hold-lease', '600s', '--memory-budget', '1GiB'))
        cls.server.compress('--method', 'snapkv')
        cls.server.run('bench', '--tokens', '1000000', '--prompts', '1', fails=True)
        cls.server.compress('--hold')
        cls.server.compress()

    def setUp(self):
        self.browser.size(1100, 900)
        self.browser.scheme('light')
        self.browser.complaints()
        self.browser.requested()
        self.show(self.server)

    def show(self, server):
        self.shown = server
        self.browser.open(server.url + '/statusz')
        if server.status()['prompts']:
            eventually('the page shows prompts', lambda: self.browser.ask('return document.querySelector("details") !== null'))

    def tearDown(self):
        self.assertEqual(self.browser.complaints(), [])
        requested = self.browser.requested()
        self.assertIn(self.shown.url + '/statusz.json', requested)
        for url in requested:
            self.assertTrue(url.startswith((self.server.url + '/', self.shown.url + '/', 'data:')), f'an external request: {url}')

    def picture(self):
        return self.browser.ask(PICTURE)

    def test_shows_what_statusz_json_says(self):
        status = self.server.status()
        self.assertEqual(self.browser.text('#state'), 'serving')
        about = self.browser.text('#about')
        for value in (status['version'], status['backend'], status['device'], '2 threads', self.server.address):
            self.assertIn(value, about)
        cards = self.browser.text('#cards')
        self.assertIn('1 cache held', cards)
        self.assertIn('of 1.0 GiB', cards)  # prompts
        self.assertIn('of 64.0 MiB', cards)  # held caches
        held = next(pool for pool in status['pools'] if pool['name'] == 'held_caches')
        bar = self.browser.ask('return document.querySelector("[aria-label^=\\"Memory: held caches\\"]").ariaLabel')
        self.assertEqual(bar, f'Memory: held caches: {100 * held["reserved_bytes"] / held["limit_bytes"]:.1f} %')
        shown = self.browser.ask('return [...document.querySelectorAll("summary")].map((s) => s.innerText)')
        self.assertEqual(len(shown), len(status['prompts']))
        for text, prompt in zip(shown, status['prompts']):
            for value in (prompt['id'], prompt['method'], '1,000 tokens', '12 of 12 layers', prompt['transport'],
                          prompt['ended'], prompt['status']['code'], f'{prompt["input_bytes"] / 2 ** 20:.1f} MiB in',
                          f'{prompt["output_bytes"] / 2 ** 10:.0f} KiB out'):
                self.assertIn(value, text)
        self.assertEqual(len(status['errors']), 1)
        for value in (status['errors'][0]['status']['code'], status['errors'][0]['status']['text']):
            self.assertIn(value, self.browser.text('#errors'))

    def test_draws_the_statistics_and_marks_the_pivot(self):
        prompt, drawn = self.server.status()['prompts'][0], self.picture()
        layers = prompt['picture']['layers']
        self.assertEqual(len(drawn['lines']), len(SERIES))
        left, width, bottom, top = 6, drawn['width'], 130, 8
        x = lambda layer: left + (width - 2 * left) * layer / (prompt['layers'] - 1)
        for name, line in zip(SERIES, drawn['lines']):
            values = {layer['layer']: layer[name] for layer in layers if name in layer}
            low, high = min(values.values()), max(values.values())
            self.assertGreater(high, low, name)
            self.assertEqual(len(points(line)), len(values), name)
            for (layer, value), (at_x, at_y) in zip(values.items(), points(line)):
                self.assertAlmostEqual(at_x, x(layer), delta=0.06, msg=name)
                self.assertAlmostEqual(at_y, bottom - (bottom - top) * (value - low) / (high - low), delta=0.06, msg=name)
            said = next(text for text in drawn['legend'] if text.startswith(name)).split()
            self.assertAlmostEqual(float(said[-3]), low, delta=abs(low) / 100, msg=name)
            self.assertAlmostEqual(float(said[-1]), high, delta=abs(high) / 100, msg=name)
        pivot = prompt['picture']['pivot']
        self.assertEqual(drawn['pivot'], f'pivot: layer {pivot["layer"]}')
        self.assertAlmostEqual(float(drawn['mark']), x(pivot['layer']), delta=0.06)
        self.assertIn(f'skeleton of {pivot["skeleton_tokens"]} tokens', drawn['text'])
        self.assertIn('Kept 10.0 % of the rows', drawn['text'])

    def test_the_strip_is_of_the_tokens_that_survived(self):
        prompt, drawn = self.server.status()['prompts'][0], self.picture()
        layers = prompt['picture']['layers']
        self.assertEqual(len(layers), prompt['layers'])
        row = len(drawn['rows']) // prompt['layers']
        self.assertGreater(drawn['height'], 40)
        for layer in layers:
            shares = bytes.fromhex(layer['kept'])
            pixels = drawn['rows'][layer['layer'] * row]
            self.assertEqual(len(pixels), len(shares))
            self.assertTrue(any(shares) and not all(shares))
            for share, pixel in zip(shares, pixels):
                self.assertAlmostEqual(pixel, 255 * math.sqrt(share / 255), delta=2)

    def test_a_method_without_statistics_says_so(self):
        with Server() as server:
            server.compress('--method', 'streaming_llm')
            self.show(server)
            self.assertIn('computes no statistics', self.browser.text('details[open] .picture'))

    def test_what_clients_write_is_text(self):
        status = self.server.status()
        markup = '<img src=x onerror="document.title = 1">'
        status['prompts'][0].update(id='f' * 32, client_session=markup, trace='0af7651916cd43dd8448eb211c80319c')
        status['running'] = [{**status['prompts'][1], 'client_session': markup}]
        status['errors'][0]['status']['text'] = markup
        # Shown and looked at in one turn, before the next answer of the server.
        texts = self.browser.ask('''
            show(arguments[0]);
            return [document.querySelector("summary").innerText, document.getElementById("running").innerText,
                    document.getElementById("errors").innerText, document.querySelectorAll("img").length, document.title];''', status)
        for text in texts[:3]:
            self.assertIn(markup, text)
        self.assertIn('trace 0af7651916cd43dd8448eb211c80319c', texts[0])
        self.assertEqual(texts[3:], [0, 'StructKV'])

    def test_connections_and_a_drain(self):
        status = self.server.status()
        self.assertNotIn('drain', status)
        status.update(connections=1234, connections_refused=5)
        show = 'show(arguments[0]); return document.getElementById("cards").innerText;'
        cards = self.browser.ask(show, status)
        self.assertIn('1,234\n5 refused', cards)
        self.assertNotIn('Drain', cards)
        status.update(draining=True, drain={'streams': 3, 'prompts': 2, 'nccl_pairs': 0, 'held_caches': 1, 'left_seconds': 28.5})
        self.assertIn('Drain\n28.5 s left\nstreams: 3, prompts: 2, NCCL pairs: 0, held caches: 1', self.browser.ask(show, status))

    def test_prompts_that_are_forgotten_go(self):
        status = self.server.status()
        first, second, third = status['prompts']
        rows = lambda *prompts: self.browser.ask(
            'show(arguments[0]); return [...document.querySelectorAll("summary")].map((s) => s.innerText.split(" · ").pop().trim())',
            {**status, 'prompts': list(prompts)})
        self.assertEqual(rows(first, third), [first['id'], third['id']])
        self.assertEqual(rows(), [])
        self.assertEqual(rows(second, first, third), [second['id'], first['id'], third['id']])

    def test_is_live_and_keeps_what_is_open_and_the_keyboards_place(self):
        browser = self.browser
        with Server() as server:
            self.show(server)
            self.assertTrue(browser.ask('return document.getElementById("no-prompts").checkVisibility()'))
            server.compress('--transport', 'inline')
            eventually('it is shown and open', lambda: browser.ask('return document.querySelector("details[open] svg") !== null'))
            self.assertFalse(browser.ask('return document.getElementById("no-prompts").checkVisibility()'))
            self.assertIn('inline: 1', browser.text('#cards'))
            first = browser.ask('const s = document.querySelector("summary"); s.focus(); return s.innerText')
            server.compress('--method', 'snapkv')
            newest = server.status()['prompts'][0]['id']
            eventually('the new prompt is shown', lambda: newest in browser.text('#prompts'))
            shown = browser.ask('return [...document.querySelectorAll("details")].map((d) => [d.open, d.firstChild.innerText])')
            self.assertEqual([is_open for is_open, _ in shown], [False, True])
            self.assertIn(newest, shown[0][1])
            self.assertEqual(shown[1][1], first)
            self.assertEqual(browser.ask('return document.activeElement.innerText'), first)

    def test_shows_a_running_prompt_with_its_progress(self):
        with Server('--silence-limit', '600s') as server:
            self.show(server)
            with prompt_on_its_way(server, '--tokens', '4096', '--transport', 'inline'):
                def shown():
                    prompt = server.status()['running'][0]
                    text = self.browser.text('#running')
                    return prompt['id'][:12] in text and f'{prompt["answered"]}/{prompt["layers"]}' in text and text
                text = eventually('its progress is shown', shown)
                for value in ('structkv', '4,096', 'inline'):
                    self.assertIn(value, text)
                self.assertTrue(self.browser.text('#cards').startswith('Prompts\n1\n'))
            eventually('it is gone', lambda: self.browser.text('#running').strip() == 'None.')

    def test_the_keyboard_reaches_everything_and_is_seen(self):
        browser = self.browser
        browser.ask('document.querySelectorAll("details").forEach((d) => { d.open = false; })')
        count = browser.ask('return document.querySelectorAll("summary").length')
        seen = []
        for _ in range(count + 10):
            browser.press(Keys.TAB)
            focus = browser.focus()
            if focus['tag'] == 'BODY' or (seen and focus == seen[0]):
                break
            self.assertTrue(focus['visible'], f'{focus} has the keyboard, and one does not see it')
            seen.append(focus)
        self.assertEqual([focus['tag'] for focus in seen].count('SUMMARY'), count)
        self.assertEqual([focus['label'] for focus in seen if focus['tag'] != 'SUMMARY'],
                         ['Running prompts', 'Recent errors', '/metrics', '/statusz.json'])
        browser.ask('document.querySelector("summary").focus()')
        browser.press(Keys.ENTER)
        self.assertTrue(browser.focus()['open'])
        self.assertTrue(browser.text('details[open] .picture'))
        browser.press(Keys.ENTER)
        self.assertFalse(browser.focus()['open'])

    def test_fits_a_phone(self):
        self.browser.size(360, 740, phone=True)
        self.browser.open(self.server.url + '/statusz')
        eventually('the picture is drawn', lambda: self.browser.ask('return document.querySelector("details[open] svg") !== null'))
        self.assertEqual(self.browser.ask('return [document.documentElement.scrollWidth, window.innerWidth]'), [360, 360])
        narrow = self.browser.ask('return [...document.querySelectorAll("svg, canvas, .card")].map((e) => e.getBoundingClientRect().right)')
        self.assertLessEqual(max(narrow), 360)

    def test_can_be_read_by_day_and_in_the_dark(self):
        grounds = {}
        for scheme in ('light', 'dark'):
            self.browser.scheme(scheme)
            grounds[scheme] = self.browser.ask('return getComputedStyle(document.body).backgroundColor')
            contrasts = self.browser.contrasts()
            self.assertGreater(len(contrasts), 30)
            self.assertGreater(sum(found['least'] == 3 for found in contrasts), 4)  # the lines of the picture
            low = [found for found in contrasts if found['ratio'] < found['least']]
            self.assertEqual(low, [], scheme)
        self.assertNotEqual(grounds['light'], grounds['dark'])

    def test_says_when_the_server_is_gone(self):
        with Server() as server:
            self.show(server)
            eventually('it is shown', lambda: self.browser.text('#state') == 'serving')
        eventually('its end is shown', lambda: 'no answer' in self.browser.text('#state'))
        for line in self.browser.complaints():  # of Chromium itself
            self.assertIn('ERR_CONNECTION_REFUSED', line)


def draw(path):
    """docs/images/statusz.png."""
    browser = Browser()
    with Server('--hold-budget', '1GiB') as server:
        server.run('bench', '--tokens', '2048', '--prompts', '1', '--transport', 'inline')
        server.compress('--hold')
        server.compress()
        with prompt_on_its_way(server, '--tokens', '16384', '--transport', 'inline') as prompt:
            browser.open(server.url + '/statusz')
            eventually('all is drawn', lambda: prompt['id'][:12] in browser.text('#running') and
                       browser.ask('return document.querySelector("details[open] svg") !== null'))
            browser.screenshot(path)
    browser.close()


if __name__ == '__main__':
    if 'STRUCTKV_SCREENSHOT' in os.environ:
        draw(os.environ.pop('STRUCTKV_SCREENSHOT'))  # no option of the server's
    else:
        unittest.main()
