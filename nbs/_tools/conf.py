"Settings of Sphinx, which reads what prep.py wrote"
import io, re, sys
from pathlib import Path
from docutils import nodes
from pygments.formatters import HtmlFormatter
from pygments.token import Comment, Generic, Keyword, String, Text
from sphinx.domains.math import MathDomain
from sphinx.highlighting import PygmentsBridge
sys.path.insert(0, str(Path(__file__).parent))
from common import cfg, root  # noqa: E402
sys.path.insert(0, str(root))   # [source] pages show this checkout, whatever is installed

project,author,release,copyright = cfg.title,cfg.author,cfg.version,cfg.copyright
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx.ext.viewcode', 'sphinx_copybutton', 'sphinxcontrib.bibtex']
exclude_patterns = ['notebooks']
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = 'hide'
numfig = True

bibtex_bibfiles = [str(cfg.nbs_path/'references.bib')]
bibtex_reference_style = 'author_year'
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist', 'fieldlist', 'attrs_inline', 'attrs_block',
                          'tasklist', 'html_image', 'alert']
myst_heading_anchors = 4
math_numfig = False
math_eqref_format = 'eq. {number}'
html_use_index = html_domain_indices = False
mathjax_path = 'mathjax/startup.js'
mathjax3_config = dict(loader=dict(load=['core', 'input/tex', 'output/chtml', 'a11y/assistive-mml']))

html_theme = 'furo'
html_title = cfg.title
templates_path = ['_templates']
html_static_path = ['_static', str(root/'_proc'/'static')]
html_css_files = ['custom.css']
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False   # browsers do not let a page on disk fetch another
html_theme_options = dict(top_of_page_buttons=[])

class FewMarks(HtmlFormatter):
    "Of code, keywords, strings and comments alone are marked, by short tags; of outputs, prompts and colours"
    tags = {Keyword: 'b', String: 'i', Comment: 'u'}

    def kind(self, o): return next((k for k in self.tags if o in k), o if o in Generic or o[:1]==('Color',) else Text)

    def format_unencoded(self, tokens, to):
        out = io.StringIO()
        super().format_unencoded(((self.kind(o), s) for o,s in tokens), out)
        short = {self._get_css_class(k): t for k,t in self.tags.items()}
        res = re.sub(r'<span class="(k|s|c)">([^<]*)</span>', lambda m: '<{0}>{1}</{0}>'.format(short[m[1]], m[2]), out.getvalue())
        to.write(re.sub(r'<pre><span></span>(?!\n)', '<pre>', res))   # browsers drop a line break that begins a block

    def get_token_style_defs(self, arg=None):
        def rule(kind, tag):
            o = self.style.style_for_token(kind)
            look = 'font: inherit; text-decoration: none' + '; font-weight: bold'*o['bold'] + '; font-style: italic'*o['italic']
            return f'{arg} {tag} {{ color: #{o["color"]}; {look} }}'
        return [*(o for o in super().get_token_style_defs(arg) if '/* Generic' in o), *(rule(*o) for o in self.tags.items())]

PygmentsBridge.html_formatter = FewMarks

class PaperMath(MathDomain):
    "A labelled equation carries the number of its tag, which is the paper's, or none"
    def note_equation(self, docname, labelid, location=None):
        super().note_equation(docname, labelid, location)
        tag = re.search(r'\\tag\{([^}]*)\}', location.astext())
        self.equations[labelid] = (docname, tag[1] if tag else '')
        if tag: location[:] = [nodes.Text(location.astext().replace(tag[0], ''))]

def setup(app): app.add_domain(PaperMath, override=True)
