__version__ = "0.1.0"
from .diagnostics import check_causality as check_causality, check_gradients as check_gradients
from .diagnostics import check_padding as check_padding
from .encoder_decoder import ReformerEncDec as ReformerEncDec
from .feed_forward import Chunk as Chunk, FeedForward as FeedForward
from .language_model import ReformerLM as ReformerLM
from .local_layer import LocalSelfAttention as LocalSelfAttention
from .lsh import LSHAttention as LSHAttention, lsh_attention as lsh_attention
from .attention import FullQKAttention as FullQKAttention
from .planner import plan as plan
from .recall import attention_recall as attention_recall
from .recorder import Recorder as Recorder
from .reformer import Autopadder as Autopadder, Reformer as Reformer
from .reversible_sequence import ReversibleSequence as ReversibleSequence
from .self_attention import LSHSelfAttention as LSHSelfAttention
from .tasks import MaskedLM as MaskedLM, SequenceClassifier as SequenceClassifier
from .series import SeriesRegressor as SeriesRegressor
from .tasks import SpanFinder as SpanFinder, TokenTagger as TokenTagger
from .training_wrapper import TrainingWrapper as TrainingWrapper

def __getattr__(name):
    "`Trainer`, which needs Accelerate, when it is asked for"
    if name!='Trainer': raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try: from .trainer import Trainer
    except ModuleNotFoundError as e: raise ImportError(f"Trainer needs {e.name}; install it by: pip install 'reformer_nb[train]'") from None
    return Trainer
