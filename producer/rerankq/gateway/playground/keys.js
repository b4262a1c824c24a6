// The dialog for the API key.

import { byId } from './elements.js';
import { key } from './gateway.js';

let afterwards = () => {};

/** Make the button and the dialog work; `changed` is called once there is another key, or none. */
export function readyKeyDialog(changed) {
  const [dialog, field] = [byId('key-dialog'), byId('key')];
  afterwards = changed;
  byId('open-key').addEventListener('click', () => ask(''));
  byId('forget-key').addEventListener('click', () => { field.value = ''; });
  dialog.addEventListener('close', () => {
    const answer = dialog.returnValue;
    if (answer === 'use') key.keep(field.value.trim());
    if (answer === 'forget') key.keep('');
    field.value = '';
    tell();
    if (answer === 'use' || answer === 'forget') afterwards();
  });
  tell();
}

function ask(fault) {
  byId('key-fault').textContent = fault;
  byId('key-fault').hidden = !fault;
  const dialog = byId('key-dialog');
  dialog.returnValue = 'cancel';
  dialog.showModal();
  byId('key').focus();
}

/** Ask for a key because the gateway wants one; say why the one that is kept is not it, if one is. */
export function askForKey(then, refusal) {
  afterwards = then;
  if (!byId('key-dialog').open) ask(key.read() ? refusal : '');
}

function tell() {
  const kept = Boolean(key.read());
  byId('open-key').textContent = kept ? 'API key: set' : 'API key';
  byId('forget-key').hidden = !kept;
}
