-- A validator's store as sn29 made it when its schema was 4, with a row or two.
create table meta(key text primary key, value text not null) strict;
create table claim(key text primary key, block integer not null, hotkey text not null) strict;
create table first_seen(hotkey text, digest text, block integer not null, primary key (hotkey, digest)) strict;
create table verdict(
  hotkey text, block integer, data blob, rules text, outcome text not null,
  primary key (hotkey, block, data, rules)) strict;
create table failure(hotkey text, block integer, data blob, count integer not null,
  primary key (hotkey, block, data)) strict;
create table repository(model text primary key, files text not null, facts text, read_by text not null) strict;
create table content(content_id text primary key, tensor_digest text, since integer, fingerprint text) strict;
create table loss(
  content_id text, tokenizer_id text, profile text, sample text,
  nats real not null, tokens integer not null, reason text not null,
  primary key (content_id, tokenizer_id, profile, sample)) strict, without rowid;
create table round(block integer primary key, plan text not null, record text, weights text) strict;
create table standing(round integer, competition text, model text, hotkey text not null, weight real not null,
  primary key (round, competition, model)) strict;
create table publication(mechanism integer, block integer, round integer not null, weights text not null,
  primary key (mechanism, block)) strict;
create table sent(mechanism integer, since integer, round integer not null, weights text not null,
  block integer, reveals_at integer, digests text not null, primary key (mechanism, since)) strict;
insert into meta values ('schema', '4'), ('chain', '0xabc netuid 29'), ('spec_version', '461');
insert into claim values ('content', 20, '5Bob');
insert into first_seen values ('5Bob', 'digest', 20);
insert into loss values ('content', 'tokenizer', 'p', 's1', 1.5, 3, ''), ('content', 'tokenizer', 'p', 's2', 9e999, 900, 'too_long');
insert into publication values (0, 7561, 7560, '{"ann": 1.0}');
insert into round values (7920, '{"block": 7920}', null, null);
insert into standing values (7560, 'c00', 'ann/model@1', 'ann', 1.0);
