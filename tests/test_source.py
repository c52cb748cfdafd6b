"How the package is written, where a rule can be checked"
import ast, sys
import nbformat, pytest, torch
from fastcore.docments import docments
from nbdev.config import get_config
from reformer_nb import LSHSelfAttention, Recorder, Reformer, ReformerLM, TrainingWrapper
from reformer_nb.compat import Always
from reformer_nb.encoder_decoder import ReformerEncDec
from reformer_nb.feed_forward import PreNorm
from reformer_nb.series import SeriesRegressor
from reformer_nb.stand_ins import UpstreamReformerLM
from reformer_nb.tasks import MaskedLM, SequenceClassifier, SpanFinder, TokenTagger

sys.path.insert(0, str(get_config().nbs_path/'_tools'))
import common  # noqa: E402

modules = {p.stem: p.read_text() for p in sorted(common.cfg.lib_path.glob('*.py')) if p.stem!='_modidx'}
constructors = {'reformer': 'Reformer', 'language_model': 'ReformerLM'}   # an argument to a line makes them longer than a screen

@pytest.mark.parametrize('name', modules)
def test_a_module_has_at_most_300_lines(name): assert len(modules[name].splitlines())<=300

def is_argument(line): return line.startswith('        ') and ', # ' in line

@pytest.mark.parametrize('page', common.notebooks(), ids=lambda p: p.stem)
def test_an_exported_cell_has_at_most_40_lines(page):
    for cell in nbformat.read(page, 4).cells:
        if cell.cell_type!='code' or not common.directives(cell).keys() & {'export', 'exports', 'exporti'}: continue
        lines = [l for l in common.body(cell).splitlines() if l.strip()]
        if f'class {constructors.get(common.slug(page), " ")}(' in cell['source']: lines = [l for l in lines if not is_argument(l)]
        assert len(lines)<=40, (cell.id, len(lines))

def functions_with_keywords():
    for module,text in modules.items():
        for f in ast.walk(ast.parse(text)):
            if isinstance(f, ast.FunctionDef) and f.args.kwarg: yield pytest.param(f, id=f'{module}-{f.name}-{f.lineno}')

def given(node):
    "What a call gets, one by one or spread, and what a new dict spreads"
    if isinstance(node, ast.Call): return [*node.args, *(k.value for k in node.keywords)]
    return [v for k,v in zip(node.keys, node.values) if k is None] if isinstance(node, ast.Dict) else []

@pytest.mark.parametrize('function', [*functions_with_keywords()])
def test_keywords_are_handed_on(function):
    "No function swallows keywords: what it hands them to refuses those that it does not know"
    name = function.args.kwarg.arg
    if ast.get_docstring(function)=='The value': return   # of `Always`, which looks at nothing, as it says
    assert any(isinstance(o, ast.Name) and o.id==name for node in ast.walk(function) for o in given(node))

lm = dict(num_tokens=11, dim=8, depth=1, max_seq_len=32, heads=2, bucket_size=4)
tokens = torch.arange(8)[None]
def trunk(**options): return ReformerLM(**{**lm, **options})
made = dict(EncDec=lambda **o: ReformerEncDec(8, enc_num_tokens=11, enc_depth=1, enc_max_seq_len=32, dec_num_tokens=11, dec_depth=1, dec_max_seq_len=32, **o),
            MaskedLM=lambda **o: MaskedLM(mask_token=10, **lm, **o), classifier=lambda **o: SequenceClassifier(num_classes=2, **lm, **o),
            tagger=lambda **o: TokenTagger(num_tags=2, **lm, **o), spans=lambda **o: SpanFinder(**lm, **o), series=lambda **o: SeriesRegressor(1, 1, dim=8, depth=1, heads=2, **o),
            upstream=lambda **o: UpstreamReformerLM(**lm, **o))
called = dict(recorder=lambda **o: Recorder(trunk())(tokens, **o), norm=lambda **o: PreNorm(8, LSHSelfAttention(8, 2, 4))(torch.ones(1, 8, 8), **o),
              wrapper=lambda **o: TrainingWrapper(trunk(causal=True))(tokens, **o), stack=lambda **o: Reformer(8, 1, heads=2)(torch.ones(1, 8, 8), **o))

@pytest.mark.parametrize('call', [*made.values(), *called.values()], ids=[*made, *called])
def test_an_unknown_keyword_is_refused(call):
    call()
    with pytest.raises(TypeError, match='inputmaks'): call(inputmaks=None)

def test_always_looks_at_nothing(): assert Always(3)(1, other=2)==3

differ = {'attn_chunks', 'max_seq_len', 'dim_head', 'n_hashes', 'use_scale_norm', 'use_rezero'}   # other defaults; a language model has more norms than those of its blocks

@pytest.mark.parametrize('other', [Reformer, LSHSelfAttention], ids=lambda o: o.__name__)
def test_an_argument_means_the_same_everywhere(other):
    "Name, type and default; in the models also the words"
    ours,theirs = (docments(o.__init__, full=True) for o in (ReformerLM, other))
    fields = ('anno', 'default', 'docment') if other is Reformer else ('anno',)
    for name in (ours.keys() & theirs.keys()) - differ - {'self', 'return'}:
        assert [ours[name][k] for k in fields]==[theirs[name][k] for k in fields], name
