"Two averages in a run of the Hugging Face Trainer: evaluated, saved with its checkpoints, the best one held at the end"
import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fastswa.averaging import ema, equal
from fastswa.integrations.transformers import AveragesCallback

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
torch.manual_seed(0)
ids = (torch.randint(32, (160, 1)) + torch.arange(8)) % 32      # short texts that count upwards
data = [dict(input_ids=o, labels=o) for o in ids]
model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2))

args = TrainingArguments(
    folder, num_train_epochs=3, per_device_train_batch_size=8, learning_rate=0.02, eval_strategy='epoch',
    save_strategy='epoch', save_total_limit=1, report_to='none', disable_tqdm=True,
    load_best_model_at_end=True, metric_for_best_model='eval_ema_loss')
callback = AveragesCallback(ema=ema(half_life='0.05dur'), swa=dict(rule=equal(), start='0.5dur'))
trainer = Trainer(model, args, train_dataset=data[:128], eval_dataset=data[128:], callbacks=[callback])
trainer.train()      # resume_from_checkpoint=True goes on from the newest checkpoint, averages too

print(callback.averages)                       # the model holds its 'ema' weights of the best evaluation
print(trainer.evaluate()['eval_loss'])
trainer.save_model(f'{folder}/best')           # as save_pretrained does
with callback.averages.using('swa'): print(trainer.evaluate(metric_key_prefix='eval_swa')['eval_swa_loss'])
