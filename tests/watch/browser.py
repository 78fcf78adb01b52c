"""Headless Chromium (Debian's packages chromium, chromium-driver and python3-selenium), and questions to a page."""
import json
import shutil

from served import skip

try:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
except ImportError:
    skip('python3-selenium is not installed (scripts/setup --watch)')

# WCAG 2's contrast of every piece of text that is shown, and of every drawn line, with what is behind it.
CONTRASTS = '''
const channels = (colour) => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour[3] > 0) return colour;
  }
  return [255, 255, 255, 1];
}
function ratio(colour, element) {
  const [a, b] = [light(channels(colour)), light(behind(element))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
const found = [];
for (const element of document.querySelectorAll('body *')) {
  if (element.getClientRects().length === 0) continue;
  const style = getComputedStyle(element);
  const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join(' ').trim();
  const svg = element instanceof SVGElement;
  if (text) found.push({what: `text "${text.slice(0, 40)}"`, least: 4.5, ratio: ratio(svg ? style.fill : style.color, element)});
  if (svg && style.stroke !== 'none') found.push({what: `line ${style.stroke}`, least: 3, ratio: ratio(style.stroke, element.closest('div'))});
}
return found;
'''

# What has the keyboard: its tag and text, and whether one sees that it has.
FOCUS = '''
const e = document.activeElement, style = getComputedStyle(e);
return {tag: e.tagName, label: e.getAttribute('aria-label') || e.textContent.trim().slice(0, 120),
        visible: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0, open: e.parentElement.open};
'''


class Browser:
    """A window of headless Chromium, as wide as a desk's."""

    def __init__(self):
        if not shutil.which('chromium') or not shutil.which('chromedriver'):
            skip('chromium or chromium-driver is not installed (scripts/setup --watch)')
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which('chromium')
        for flag in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'disable-gpu', 'disable-background-networking',
                     'disable-component-update', 'no-first-run', 'hide-scrollbars', 'lang=en'):
            options.add_argument(f'--{flag}')
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
        self.driver = webdriver.Chrome(service=Service(shutil.which('chromedriver')), options=options)
        self.size(1100, 900)

    def size(self, width, height, phone=False):
        self.driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
            'width': width, 'height': height, 'deviceScaleFactor': 2 if phone else 1, 'mobile': phone})

    def scheme(self, name):
        self.driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {
            'features': [{'name': 'prefers-color-scheme', 'value': name}]})

    def open(self, url):
        self.driver.get(url)

    def ask(self, script, *words):
        return self.driver.execute_script(script, *words)

    def text(self, selector):
        return self.ask('return document.querySelector(arguments[0]).innerText', selector)

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def focus(self):
        return self.ask(FOCUS)

    def contrasts(self):
        return self.ask(CONTRASTS)

    def requested(self):
        """Addresses that were asked for since the last call."""
        events = (json.loads(entry['message'])['message'] for entry in self.driver.get_log('performance'))
        return [event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent']

    def complaints(self):
        """What the console says since the last call."""
        return [entry['message'] for entry in self.driver.get_log('browser')]

    def screenshot(self, path):
        self.driver.save_screenshot(str(path))

    def close(self):
        self.driver.quit()
