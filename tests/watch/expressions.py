"""What operators' files ask of Prometheus: the rules' and dashboards' expressions, and the names in them."""
import dataclasses
import json
import re

import yaml

from served import SOURCE

RULES = SOURCE / 'k8s/components/prometheus-rule/structkv.rules.yaml'
SCALERS = SOURCE / 'k8s/components/keda/scaled-object.yaml', SOURCE / 'k8s/components/hpa/adapter-rules.yaml'
DASHBOARDS = sorted((SOURCE / 'k8s/components/dashboards').glob('*.json'))

TOKEN = re.compile(r'''\s+|\#[^\n]*|(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<range>\[[^\]]*\])
    |(?P<number>\d[\w.]*)|(?P<name>[a-zA-Z_:][\w:]*)|(?P<sign>=~|!~|!=|==|<=|>=|[-+*/%^<>={}(),@])''', re.VERBOSE)
LABEL_LISTS = {'by', 'without', 'on', 'ignoring', 'group_left', 'group_right'}
WORDS = LABEL_LISTS | {'and', 'or', 'unless', 'offset', 'bool', 'inf', 'nan', 'atan2'}
LABEL_IN_TEXT = re.compile(r'\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}')


@dataclasses.dataclass
class Expression:
    where: str
    text: str
    shown: set = dataclasses.field(default_factory=set)  # labels that a legend or an annotation shows
    may_be_empty: bool = False


@dataclasses.dataclass
class Names:
    selectors: list  # (metric, [(label, operator, value)])
    labels: set  # of groupings and matchings


def names_of(text):
    """The metrics and labels in an expression of PromQL."""
    tokens, at = [], 0
    while at < len(text):
        token = TOKEN.match(text, at)
        if token is None:
            raise ValueError(f'no token of PromQL at {text[at:at + 20]!r}')
        at = token.end()
        if token.lastgroup:
            tokens.append((token.lastgroup, token.group().strip('"\'') if token.lastgroup == 'string' else token.group()))
    names, i = Names([], set()), 0

    def upto(close):
        nonlocal i
        start = i
        while tokens[i][1] != close:
            i += 1
        i += 1
        return tokens[start:i - 1]

    while i < len(tokens):
        kind, word = tokens[i]
        following = tokens[i + 1][1] if i + 1 < len(tokens) else ''
        i += 1
        if kind != 'name':
            continue
        if word in LABEL_LISTS and following == '(':
            i += 1
            names.labels |= {label for kind, label in upto(')') if kind == 'name'}
        elif word not in WORDS and following not in ('(', 'by', 'without'):
            matchers = []
            if following == '{':
                i += 1
                words = [word for _, word in upto('}') if word != ',']
                matchers = list(zip(words[::3], words[1::3], words[2::3]))
            names.selectors.append((word, matchers))
    return names


def alerts():
    return [rule for group in yaml.safe_load(RULES.read_text())['groups'] for rule in group['rules']]


def of_rules():
    for rule in alerts():
        texts = ' '.join(rule['annotations'].values())
        yield Expression(rule['alert'], rule['expr'], set(LABEL_IN_TEXT.findall(texts)), may_be_empty=True)


def panels_of(dashboard):
    return [panel for panel in dashboard['panels'] if panel['type'] != 'row']


def of_dashboards():
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in panels_of(dashboard):
            for target in panel['targets']:
                yield Expression(f'{path.name}: {panel["title"]}', target['expr'],
                                 set(LABEL_IN_TEXT.findall(target.get('legendFormat', ''))))


def of_scalers():
    """Of KEDA, and of prometheus-adapter with what it fills in for a replica."""
    keda, adapter = (yaml.safe_load(path.read_text()) for path in SCALERS)
    for trigger in keda['spec']['triggers']:
        yield Expression('keda', trigger['metadata']['query'])
    filled = {'LabelMatchers': 'namespace="structkv",pod="structkv-0"', 'GroupBy': 'pod'}
    for rule in adapter['rules']:
        yield Expression('adapter', rule['seriesQuery'])
        filled['Series'] = rule['seriesQuery'].split('{')[0]
        yield Expression('adapter', re.sub(r'<<\.(\w+)>>', lambda name: filled[name.group(1)], rule['metricsQuery']), {'pod'})


def variables_of(dashboard):
    """(metric, label) of what the dashboard lets one choose from."""
    for variable in dashboard['templating']['list']:
        if variable['type'] == 'query':
            metric, label = re.fullmatch(r'label_values\((\w+)(?:\{.*\})?, (\w+)\)', variable['query']['query']).groups()
            yield variable['name'], metric, label
