"Reformers of Hugging Face, loaded here: the same numbers; and what is wrong there is right here"
import warnings
from itertools import product
import pytest
import torch
import torch.nn.functional as F
import hf
from grids import sample
from reformer_nb import ReformerLM

def close(a, b, atol=1e-9): torch.testing.assert_close(a, b, rtol=0, atol=atol)

def draw(config, n, b=3, seed=0): return torch.randint(1, config.vocab_size, (b, n), generator=torch.Generator().manual_seed(seed))

def masks(kind, b, n):
    if kind=='none': return None
    if kind=='end': return (torch.arange(n) < torch.tensor([n, max(1, n-3), max(1, n//3)])[:,None]).long()
    return (torch.rand(b, n, generator=torch.Generator().manual_seed(n)) > .3).long().index_fill(1, torch.tensor([0]), 1)

def pair(seed, task='causal_lm', **options):
    decoder = dict(is_decoder=task!='masked_lm') if task in ('causal_lm','masked_lm') else {}
    if task=='causal_lm': decoder.update(local_num_chunks_after=0, lsh_num_chunks_after=0)   # which that class asks for
    if task=='question_answering': decoder['num_labels'] = 2
    theirs = hf.new_model(hf.random_config(seed, **{**decoder, **options}), task, seed)
    return theirs,ReformerLM.from_huggingface(theirs, task)

# the same numbers

tasks = list(hf.classes)
grid = list(product(range(40), ('none','end','holes'), ('whole','short','odd')))

@pytest.mark.parametrize('seed,mask,length', sample(grid, 30))
def test_outputs_and_buckets(seed, mask, length):
    "All options, tasks, masks, lengths: outputs of real tokens to 1e-9, and the same buckets"
    task = tasks[seed%5]
    theirs,ours = pair(seed, task)
    n = dict(whole=48, short=min(theirs.config.lsh_attn_chunk_length, theirs.config.local_attn_chunk_length), odd=29)[length]
    tokens,seen = draw(theirs.config, n),masks(mask, 3, n)
    with torch.no_grad(), hf.single_draws():
        with hf.our_buckets() as mine: got = hf.our_outputs(ours, task, tokens, seen)
        with hf.heard_buckets(theirs) as want_buckets: want = hf.outputs(theirs, task, tokens, seen)
    assert len(mine)==len(want_buckets)
    for a,b in zip(mine, want_buckets): assert torch.equal(a.long(), b)
    real = seen.bool() if seen is not None and got.ndim==3 else ...
    close(got[real], want[real])

def loss_of(task, out, tokens, seen):
    "A loss in float64; the library computes that of the next token in float32"
    if task=='causal_lm': return F.cross_entropy(out[:,:-1].flatten(0, 1), tokens[:,1:].masked_fill(~seen[:,1:].bool(), -100).flatten())
    if task=='masked_lm': return F.cross_entropy(out.flatten(0, 1), tokens.masked_fill(~seen.bool() | (tokens%3>0), -100).flatten())
    if task=='sequence_classification': return F.cross_entropy(out, tokens[:,0]%3)
    if task=='question_answering':
        out = out.masked_fill(~seen.bool()[...,None], -torch.inf)   # no answer stands in padding, on which they bet too
        return (F.cross_entropy(out[...,0], tokens[:,1]%10) + F.cross_entropy(out[...,1], tokens[:,2]%10))/2
    return (out*seen[...,None]).sin().sum()/len(tokens)

def our_loss(model, task, tokens, seen):
    "The same by our models' own `loss`, where they have one"
    if task=='causal_lm': return model.loss(tokens, seen)
    if task=='masked_lm': return model.loss(tokens, seen, labels=tokens.masked_fill(tokens%3>0, -100))
    if task=='sequence_classification': return model.loss(tokens, tokens[:,0]%3, seen)
    if task=='question_answering': return model.loss(tokens, tokens[:,1]%10, tokens[:,2]%10, seen)
    return loss_of(task, model(tokens, seen), tokens, seen)

@pytest.mark.parametrize('seed,mask', sample(product(range(40), ('none','end')), 15))
def test_loss_and_gradients(seed, mask):
    "Training as the library does it, in the one length that its grid allows: loss and all gradients to 1e-9"
    from reformer_nb.huggingface import own_tensors
    task = tasks[seed%5]
    theirs,ours = pair(seed, task, axial_pos_shape=[6,8], max_position_embeddings=48)
    tokens,seen = draw(theirs.config, 48),masks(mask, 3, 48)
    given = torch.ones_like(tokens) if seen is None else seen
    theirs.train(),ours.train()
    with hf.single_draws():
        want = loss_of(task, hf.outputs(theirs, task, tokens, seen), tokens, given)
        want.backward()
        got = our_loss(ours, task, tokens, given)
    close(got, want)
    own = own_tensors(ours, task)
    grads = dict(zip(own, torch.autograd.grad(got, list(own.values()))))
    for k,o in theirs.named_parameters():
        if o.grad is not None: close(grads[k.removeprefix('reformer.')].reshape(o.shape), o.grad)

@pytest.mark.parametrize('seed', range(8))
def test_float32(seed):
    "In float32 to 1e-4 where every query sees another key"
    theirs = hf.new_model(hf.random_config(seed, is_decoder=False), 'base', seed).float()
    ours,tokens = ReformerLM.from_huggingface(theirs),draw(theirs.config, 48)
    with torch.no_grad(): close(ours(tokens), hf.outputs(theirs, 'base', tokens), 1e-4)

def test_float32_of_queries_that_see_another_key():
    "A causal layer: where a query saw nothing but itself in all rounds, their float32 is off, ours is not"
    from reformer_nb import Recorder
    config = hf.random_config(0, attn_layers=['lsh'], is_decoder=True, num_hashes=3, num_buckets=[4,2], lsh_attn_chunk_length=4, lsh_num_chunks_before=1, lsh_num_chunks_after=0)
    exact = hf.new_model(config, 'causal_lm')
    tokens = draw(config, 48)
    ours = Recorder(ReformerLM.from_huggingface(exact).float())
    with torch.no_grad():
        got,want = ours(tokens),hf.outputs(exact.float(), 'causal_lm', tokens)
    attn = ours.recordings[0][0]['attn']
    met = (attn.diagonal(dim1=-2, dim2=-1)==0).all(1)
    assert 0 < (~met).sum() < met.numel()/2
    close(got[met], want[met], 1e-4)

def test_rotations_without_a_seed():
    "Drawn from the global generator, as there: the same seed before a call gives the same outputs"
    theirs,ours = pair(2, hash_seed=None, num_buckets=8)
    tokens,results = draw(theirs.config, 48),[]
    for f in (lambda: hf.outputs(theirs, 'causal_lm', tokens), lambda: ours(tokens)):
        torch.manual_seed(7)
        with torch.no_grad(), hf.single_draws(): results += [f(), torch.rand(3)]
    close(results[0], results[2])
    assert torch.equal(results[1], results[3])

# to and fro

@pytest.mark.parametrize('seed', sample(range(40), 6))
def test_round_trip(seed, tmp_path):
    "Written back, the library computes the same, and here the model comes back as it was"
    task = tasks[seed%5]
    theirs,ours = pair(seed, task)
    ours.to_huggingface(tmp_path)
    again = hf.classes[task].from_pretrained(tmp_path).eval()
    tokens = draw(theirs.config, 29)
    assert again.dtype==torch.double
    with torch.no_grad(), hf.single_draws():
        close(hf.outputs(again, task, tokens), hf.outputs(theirs, task, tokens), 1e-12)   # feed-forward in one piece there, perhaps
    assert all(torch.equal(o, again.state_dict()[k].double()) for k,o in theirs.state_dict().items())
    back = ReformerLM.from_huggingface(tmp_path)
    assert type(back) is type(ours)
    same = dict(back.net.config if hasattr(back, 'net') else back.config)
    for k,o in (ours.net.config if hasattr(ours, 'net') else ours.config).items(): assert k in ('ff_chunks', 'hash_seed') or same[k]==o, k
    assert all(torch.equal(a, b) for a,b in zip(back.parameters(), ours.parameters(), strict=True))

@pytest.mark.parametrize('task', tasks)
def test_saved_there_loaded_here_saved_here(task, tmp_path):
    from reformer_nb.checkpoints import load_pretrained
    theirs,ours = pair(2+tasks.index(task), task)
    theirs.save_pretrained(tmp_path/'there')
    loaded = ReformerLM.from_huggingface(tmp_path/'there')
    loaded.save_pretrained(tmp_path/'here')
    again = load_pretrained(tmp_path/'here')
    tokens = draw(theirs.config, 29)
    with torch.no_grad():
        for o in (loaded, again):
            torch.manual_seed(0)
            got = hf.our_outputs(o, task, tokens)
            torch.manual_seed(0)
            assert torch.equal(got, hf.our_outputs(ours, task, tokens))

def test_old_files(tmp_path):
    "A pickle, with constants of old releases, a bias of the decoder's own, and stray keys in the configuration"
    import json
    theirs,_ = pair(2)
    state = {k: o.detach().clone() for k,o in theirs.state_dict().items()}
    for k in ('self_mask_value_float16', 'mask_value_float32'): state[f'reformer.encoder.layers.0.attention.self_attention.{k}'] = torch.tensor(-1e5)
    state['lm_head.decoder.bias'],state['lm_head.bias'] = state['lm_head.bias'],torch.zeros_like(state['lm_head.bias'])
    torch.save(state, tmp_path/'pytorch_model.bin')
    (tmp_path/'config.json').write_text(json.dumps({**theirs.config.to_dict(), 'output_past': True, 'seed': 0, 'sinusoidal_pos_embds': False, 'num_chunks_before': 1}))
    tokens = draw(theirs.config, 29)
    with torch.no_grad(), hf.single_draws(): close(ReformerLM.from_huggingface(tmp_path, 'causal_lm')(tokens), hf.outputs(theirs, 'causal_lm', tokens))

def test_weights_in_several_files(tmp_path):
    theirs,ours = pair(2)
    theirs.save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('*.safetensors')))>1
    tokens = draw(theirs.config, 29)
    with torch.no_grad(): assert torch.equal(ReformerLM.from_huggingface(tmp_path)(tokens), ours(tokens))

def test_a_new_head():
    theirs,_ = pair(2)
    theirs.config.num_labels = 4
    model = ReformerLM.from_huggingface(theirs, 'sequence_classification', new_head=True)
    assert model(draw(theirs.config, 29)).shape==(3,4) and next(model.to_out.parameters()).dtype==torch.double
    with pytest.raises(ValueError, match=r'missing classifier.dense.weight, .* and 1 more; pass new_head=True'): ReformerLM.from_huggingface(theirs, 'sequence_classification')

# the wrong thing

@pytest.fixture
def saved(tmp_path):
    theirs,_ = pair(2)
    theirs.save_pretrained(tmp_path)
    return tmp_path

def change(directory, **changes):
    import json
    config = {**json.loads((directory/'config.json').read_text()), **changes}
    (directory/'config.json').write_text(json.dumps(config))

def test_another_architecture_is_refused(saved):
    change(saved, model_type='bert')
    with pytest.raises(ValueError, match="of a 'bert', not of a 'reformer'"): ReformerLM.from_huggingface(saved)
    with pytest.raises(TypeError, match='Linear without a configuration'): ReformerLM.from_huggingface(torch.nn.Linear(2, 2))

@pytest.mark.parametrize('changes,says', [
    (dict(hidden_size=32, axial_pos_embds_dim=[16,16]), r'embeddings.word_embeddings.weight has shape \(40, 24\), the configuration asks for \(40, 32\)'),
    (dict(vocab_size=41), r'word_embeddings.weight has shape \(40, 24\), the configuration asks for \(41, 24\)'),
    (dict(attn_layers=['local','lsh','local','lsh']), 'missing encoder.layers.3.attention'),
    (dict(attn_layers=['local','local','local']), r'missing encoder.layers.1.attention.self_attention.query.weight.*; unexpected encoder.layers.1.attention.self_attention.query_key'),
    (dict(attn_layers=['local','lsh']), 'unexpected encoder.layers.2.attention'),
    (dict(attn_layers=['local','far','local']), r"attn_layers holds \['far'\]"),
    (dict(hidden_act='quick'), "hidden_act='quick' is not known"),
    (dict(is_decoder=False), 'says is_decoder=False')])
def test_a_configuration_that_does_not_fit_is_refused(saved, changes, says):
    change(saved, **changes)
    with pytest.raises(ValueError, match=says): ReformerLM.from_huggingface(saved)

def test_remedies_help(saved):
    "What an error advises is then accepted"
    change(saved, hidden_act='quick')
    model = ReformerLM.from_huggingface(saved, ff_activation=torch.nn.GELU)
    assert model.config['ff_activation'] is torch.nn.GELU

def test_the_token_of_a_mask_comes_back(tmp_path):
    theirs,_ = pair(2)
    change_to = dict(is_decoder=False, pad_token_id=7, architectures=['ReformerForMaskedLM'])
    theirs.save_pretrained(tmp_path/'a')
    change(tmp_path/'a', **change_to)
    model = ReformerLM.from_huggingface(tmp_path/'a', 'masked_lm')
    model.to_huggingface(tmp_path/'b')
    assert model.config['mask_token']==7==ReformerLM.from_huggingface(tmp_path/'b').config['mask_token']
    with pytest.raises((TypeError, ValueError), match='causal'): ReformerLM.from_huggingface(tmp_path/'a', 'masked_lm', causal=True)

def test_missing_and_damaged_files_are_refused(saved):
    file = saved/'model.safetensors'
    whole = file.read_bytes()
    for k in (0, 4, 100, len(whole)//2, len(whole)-1):
        file.write_bytes(whole[:k])
        with pytest.raises(ValueError, match=r'model.safetensors is damaged \([^\n]+\); download it again'): ReformerLM.from_huggingface(saved)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='holds none of model.safetensors'): ReformerLM.from_huggingface(saved)
    (saved/'pytorch_model.bin').write_bytes(whole)
    with pytest.raises(ValueError, match='pytorch_model.bin is'): ReformerLM.from_huggingface(saved)
    (saved/'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json is damaged'): ReformerLM.from_huggingface(saved)
    (saved/'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='config.json is missing'): ReformerLM.from_huggingface(saved)
    with pytest.raises(FileNotFoundError, match='config.json is missing'): ReformerLM.from_huggingface(saved/'nowhere')

@pytest.mark.parametrize('load', ['from_huggingface', 'from_pretrained'])
def test_the_hub_without_a_network(load, monkeypatch, tmp_path):
    import huggingface_hub
    def offline(*args, **options): raise huggingface_hub.errors.LocalEntryNotFoundError('no connection')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(FileNotFoundError, match=r'user/name is no folder, and the hub did not give it \(LocalEntryNotFoundError: no connection\); check the id and the network'):
        getattr(ReformerLM, load)('user/name')

def test_an_error_without_a_message_is_told(monkeypatch):
    import huggingface_hub
    from reformer_nb.hub import local_directory
    def fail(*args, **options): raise ConnectionError()
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
    with pytest.raises(FileNotFoundError, match=r'the hub did not give it \(ConnectionError: no message\)'): local_directory('no/such', ('config.json',))

def test_an_id_on_the_hub(monkeypatch, saved, tmp_path):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **options: asked.append((name, options)) or saved)
    assert ReformerLM.from_huggingface('google/reformer-enwik8').config['dim']==24
    assert asked[0][0]=='google/reformer-enwik8' and '*.bin' in asked[0][1]['allow_patterns']

def test_what_they_do_not_have_is_not_written(tmp_path):
    model = ReformerLM(num_tokens=40, dim=24, depth=2, max_seq_len=64, heads=3, dim_head=8, causal=True)
    with pytest.raises(ValueError, match='Hugging Face has no Reformer with'): model.to_huggingface(tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_limit_that_does_not_come_back_is_refused(saved, tmp_path):
    change(saved, num_buckets=None)
    loaded = ReformerLM.from_huggingface(saved)
    loaded.to_huggingface(tmp_path/'same')
    assert ReformerLM.from_huggingface(tmp_path/'same').config['split_above']==loaded.config['split_above']
    other = ReformerLM(**{**loaded.config, 'split_above': 3})
    with pytest.raises(ValueError, match='Hugging Face has no Reformer with split_above=3'): other.to_huggingface(tmp_path/'other')

@pytest.mark.parametrize('options', [dict(num_buckets=None), dict(num_buckets=8)])
def test_a_row_writes_the_same_beside_longer_ones(options):
    _,ours = kind(**options)
    tokens = torch.randint(40, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40)>=torch.tensor([[0],[31]])
    both = ours.generate(tokens, 3, temperature=0, input_mask=mask)
    assert torch.equal(both[1:], ours.generate(tokens[1:,31:], 3, temperature=0))

# what is wrong there is right here

def kind(seed=1, **options):
    "An imported language model whose grid has 48 places, with 'lsh' and 'local' layers unless `options` say otherwise"
    config = dict(attn_layers=['local','lsh','local','lsh'], lsh_attn_chunk_length=8, local_attn_chunk_length=4, num_hashes=2, num_buckets=6, lsh_num_chunks_before=1,
                  lsh_num_chunks_after=0, local_num_chunks_before=1, axial_pos_embds=True, axial_pos_shape=[6,8], max_position_embeddings=48)
    return pair(seed, **{**config, **options})

local = dict(attn_layers=['local']*3)

def grads_of(model, tokens, seed=1):
    torch.manual_seed(seed)
    loss = model.loss(tokens)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

def plainly(model):
    import copy
    res = copy.deepcopy(model)
    res.reformer.layers.reverse_thres = 10**9
    return res

def test_b1_the_bias_of_the_logits_is_applied():
    theirs,ours = kind()
    tokens = draw(theirs.config, 48)
    with torch.no_grad(), hf.single_draws():
        without = theirs(tokens).logits
        close(ours(tokens), without + theirs.lm_head.bias)
    assert theirs.lm_head.bias.abs().max()>.1
    ours.loss(tokens).backward()
    assert ours.to_logits.bias.grad.abs().max()>0

@pytest.mark.parametrize('task', tasks)
def test_b1_a_bias_that_is_written_is_told(task, tmp_path):
    "Unless it is zero, or the task has none; what the warning advises helps, and so does the norm before, which can hold it"
    theirs,ours = pair(2+tasks.index(task), task)
    if task in ('causal_lm', 'masked_lm'):
        last = (lm := getattr(ours, 'net', ours)).to_logits
        torch.nn.init.constant_(last.bias, -.5)
        with pytest.warns(UserWarning, match=r'lm_head.bias and does not add it, so its logits differ by up to 0.5; add it there'): ours.to_huggingface(tmp_path)
        there = hf.classes[task].from_pretrained(tmp_path).eval()
        tokens = draw(theirs.config, 48)
        with torch.no_grad(), hf.single_draws(): close(hf.our_outputs(ours, task, tokens), there(tokens).logits + there.lm_head.bias)
        with torch.no_grad(), hf.single_draws():
            before = hf.our_outputs(ours, task, tokens)
            lm.norm.bias += torch.linalg.pinv(last.weight) @ last.bias
            last.bias.zero_()
            close(hf.our_outputs(ours, task, tokens), before)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ours.to_huggingface(tmp_path)

@pytest.mark.parametrize('layers', [['lsh']*3, ['local','lsh','local'], ['local']*2])
def test_b2_gradients_are_right_with_dropout(layers):
    rates = dict(hidden_dropout_prob=.1, local_attention_probs_dropout_prob=.1, lsh_attention_probs_dropout_prob=.1)
    theirs,ours = kind(attn_layers=layers, **rates)
    tokens = draw(theirs.config, 48)
    ours.train()
    found,want = grads_of(ours, tokens),grads_of(plainly(ours), tokens)
    assert (found[0]-grads_of(ours, tokens, 2)[0])!=0   # dropout is there
    for a,b in zip(found, want): close(a, b, 1e-11)

@pytest.mark.parametrize('how', [local, dict(causal='strict')])
def test_b3_rows_of_a_batch_do_not_mix_in_a_cache(how):
    theirs,ours = kind(**how) if how is local else (kind()[0], ReformerLM.from_huggingface(kind()[0], **how))
    prompt = draw(theirs.config, 9)
    cached = ours.generate(prompt, 12, temperature=0, use_cache=True)
    for row,new in zip(prompt, cached): assert torch.equal(ours.generate(row[None], 12, temperature=0, use_cache=False)[0], new)
    state,logits = ours.init_state(3),[]
    for o in torch.cat([prompt, cached], 1).split(1, 1):
        out,state = ours(o, state=state)
        logits.append(out)
    close(torch.cat(logits, 1), ours(torch.cat([prompt, cached], 1)), 1e-10)

def test_b4_what_a_cache_would_change_is_refused():
    _,ours = kind()
    prompt = torch.arange(1, 10)[None]
    with pytest.raises(ValueError, match='use_cache=True would change the result'): ours.generate(prompt, 5, use_cache=True)
    new = ours.generate(prompt, 12, temperature=0)
    text = prompt
    for _ in range(12): text = torch.cat([text, ours(text)[:,-1:].argmax(-1)], 1)
    assert torch.equal(new, text[:,9:])

def test_b5_another_number_of_rounds_forward_and_backward():
    theirs,_ = kind()
    tokens = draw(theirs.config, 48)
    ours = ReformerLM.from_huggingface(theirs, n_hashes=4)
    with torch.no_grad(), hf.single_draws(): close(ours(tokens), theirs(tokens, num_hashes=4).logits + theirs.lm_head.bias)
    for a,b in zip(grads_of(ours.train(), tokens), grads_of(plainly(ours), tokens)): close(a, b, 1e-11)

@pytest.mark.parametrize('n', [1, 2, 5, 13, 29, 47])
def test_b6_any_length_in_training_and_evaluation(n):
    _,ours = kind()
    tokens = draw(ours_config := kind()[0].config, n+1)
    for mode in (True, False):
        for a,b in zip(grads_of(ours.train(mode), tokens), grads_of(plainly(ours), tokens)): close(a, b, 1e-11)
    assert ours(tokens[:,:n]).shape==(3, n, ours_config.vocab_size)

def test_b7_automatic_buckets_and_a_short_prompt():
    theirs,ours = kind(num_buckets=None)
    assert ours.config['n_buckets']=='power'
    prompt = draw(theirs.config, 3)
    new = ours.generate(prompt, 30, temperature=0)
    text = torch.cat([prompt, new], 1)
    with torch.no_grad(): assert torch.equal(ours(text[:,:-1])[:,-1].argmax(-1), new[:,-1])
    assert ours.config['n_buckets']=='power'   # a length that was seen first decides nothing

@pytest.mark.parametrize('n', [16, 32, 48, 61, 64])
def test_automatic_buckets_of_two_digits(n):
    theirs,ours = kind(num_buckets=None, lsh_attn_chunk_length=4, axial_pos_shape=[8,8], max_position_embeddings=64)
    tokens = draw(theirs.config, n)
    with torch.no_grad(), hf.single_draws(): close(ours(tokens), hf.outputs(theirs, 'causal_lm', tokens))
    assert theirs.config.num_buckets=={16: 8, 32: [4,4], 48: [4,4], 61: [4,8], 64: [4,8]}[n]

@pytest.mark.parametrize('how', [local, dict(causal='strict')])
def test_b8_more_heads_than_places_in_a_chunk_and_segments(how):
    small = dict(num_attention_heads=6, attention_head_size=4, lsh_attn_chunk_length=4, local_attn_chunk_length=4)
    theirs,ours = kind(**small, **local) if how is local else kind(**small)
    if how is not local: ours = ReformerLM.from_huggingface(theirs, **how)
    tokens,state,found = draw(theirs.config, 40),ours.init_state(3),[]
    for part in tokens.split([7,1,12,20], 1):
        out,state = ours(part, state=state)
        found.append(out)
    close(torch.cat(found, 1), ours(tokens), 1e-10)

def test_b9_three_sides_of_a_grid(tmp_path):
    import transformers
    config = hf.random_config(2, is_decoder=True, axial_pos_embds=True, axial_pos_shape=[2,3,8], axial_pos_embds_dim=[4,8,12], max_position_embeddings=48, lsh_num_chunks_after=0, local_num_chunks_after=0)
    theirs = hf.new_model(config, 'causal_lm')
    tables = theirs.reformer.embeddings.position_embeddings.weights
    ours = ReformerLM.from_huggingface(theirs)
    want = torch.cat([o.expand(2, 3, 8, -1) for o in tables], -1).flatten(0, 2)
    close(ours.pos_emb(torch.arange(48)), want, 0)
    ours.to_huggingface(tmp_path)
    again = transformers.ReformerModelWithLMHead.from_pretrained(tmp_path)
    assert all(torch.equal(a.double(), b) for a,b in zip(again.reformer.embeddings.position_embeddings.weights, tables))
    assert ours(draw(config, 31)).isfinite().all()

def test_b10_gradients_in_evaluation_and_by_autograd_grad():
    _,ours = kind()
    tokens = torch.arange(1, 33)[None] % 40
    want = grads_of(plainly(ours.eval()), tokens)
    for a,b in zip(grads_of(ours, tokens), want): close(a, b, 1e-11)
    ours.loss(tokens).backward()
    for a,b in zip(ours.parameters(), want[1:]): close(a.grad, b, 1e-11)

def test_b11_activations_do_not_grow_with_depth():
    def kept(depth):
        "Bytes that a forward pass in training keeps, weights and buckets apart"
        _,ours = kind(attn_layers=['local','lsh']*depth)
        known,found = {o.data_ptr() for o in ours.parameters()},{}
        def pack(x):
            if x.is_floating_point() and x.data_ptr() not in known: found[x.data_ptr()] = x.numel()*x.element_size()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): ours.train().loss(torch.arange(1, 49)[None] % 40)
        return sum(found.values())
    assert kept(1)==kept(4)

@pytest.mark.parametrize('layers', [['local','lsh','local'], ['local']*2])
def test_b12_padded_prompts_are_masked(layers):
    theirs,ours = kind(attn_layers=layers)
    prompt,lengths = draw(theirs.config, 12),(12, 7, 3)
    real = torch.arange(12) >= 12-torch.tensor(lengths)[:,None]
    for mask,text in ((real, prompt), (real.flip(1), prompt.flip(1))):   # padding in front, and behind
        new = ours.generate(text.masked_fill(~mask, 0), 5, input_mask=mask, temperature=0)
        assert torch.equal(new, ours.generate(text.masked_fill(~mask, 5), 5, input_mask=mask, temperature=0))
        for row,m,found in zip(text, mask, new): assert torch.equal(ours.generate(row[m][None], 5, temperature=0)[0], found)

def test_b13_the_global_generator_is_left_alone():
    theirs,ours = kind()
    tokens = draw(theirs.config, 48)
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    with torch.no_grad(): ours(tokens)
    ours.train().loss(tokens).backward()
    assert torch.equal(torch.rand(3), want)
    torch.manual_seed(3)
    with torch.no_grad(): theirs(tokens)
    assert not torch.equal(torch.rand(3), want)

# what our models can do

def test_backends_agree():
    theirs,_ = kind()
    tokens,mask = draw(theirs.config, 41),masks('end', 3, 41)
    fused,plain = (ReformerLM.from_huggingface(theirs, backend=o) for o in ('fused','reference'))
    for a,b in zip(grads_of(fused, tokens), grads_of(plain, tokens)): close(a, b, 1e-11)
    with torch.no_grad(): close(fused(tokens, mask), plain(tokens, mask), 1e-11)

def test_recorder_diagnostics_and_steps():
    from reformer_nb import Recorder, attention_recall, check_gradients
    theirs,ours = kind()
    tokens = draw(theirs.config, 48)
    recorder = Recorder(ours)
    with torch.no_grad(): recorder(tokens)
    entries = recorder.recordings[0]
    assert len(entries)==2 and entries[0]['attn'].shape==(3, theirs.config.num_attention_heads, 48, 48)   # of the layers that hash
    close(entries[0]['attn'].sum(-1), torch.ones(3, theirs.config.num_attention_heads, 48), 1e-5)
    rows = attention_recall(ours, tokens, top_k=4)
    assert len(rows)==2*theirs.config.num_attention_heads and all(0<o['mass']<=1 for o in rows)
    check_gradients(ours, tokens)
    optimizer,losses = torch.optim.Adam(ours.parameters(), 1e-3),[]
    for _ in range(8):
        losses.append(ours.train().loss(tokens))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1]<losses[0]
