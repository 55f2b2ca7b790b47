// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cases, by the service that they are about.

mod controller;
mod crash;
mod node;
mod snapshots;

use crate::Res;
use crate::fixture::{Disk, Node};

type Case = (&'static str, Disk, fn(&mut Node) -> Res);

pub const ALL: &[Case] = &[
    ("controller::says_who_it_is", Disk::Ext4, controller::identity),
    ("controller::creates_and_deletes_once", Disk::Ext4, controller::idempotent),
    ("controller::names_the_field_that_is_missing", Disk::Ext4, controller::fields),
    ("controller::unknown_volumes_are_not_found", Disk::Ext4, controller::unknown),
    ("controller::names_have_128_bytes_of_any_character", Disk::Ext4, controller::names),
    ("controller::lists_in_pages", Disk::Ext4, controller::pages),
    ("controller::a_full_disk_refuses_and_keeps_nothing", Disk::Small, controller::full),
    ("controller::keeps_foreign_and_damaged_files", Disk::Ext4, controller::foreign),
    ("controller::one_driver_per_directory", Disk::Ext4, controller::one_driver),
    ("node::a_pod_writes_and_another_reads", Disk::Ext4, node::pods),
    ("node::block_volumes", Disk::Ext4, node::block_volume),
    ("node::a_single_writer_is_single", Disk::Ext4, node::single_writer),
    ("node::never_formats_what_has_content", Disk::Ext4, node::content),
    ("node::xfs_grows_while_mounted", Disk::Xfs, node::xfs_grows),
    ("node::ext4_grows_while_mounted", Disk::Xfs, node::ext4_grows),
    ("node::a_group_gets_the_files", Disk::Ext4, node::group),
    ("node::files_of_fuse_are_refused", Disk::Ext4, node::fuse),
    ("node::inline_volumes_end_with_their_pod", Disk::Ext4, node::inline),
    ("node::ten_volumes_at_once", Disk::Ext4, node::ten),
    ("snapshots::restore_the_same_bytes", Disk::Xfs, snapshots::restore),
    ("snapshots::a_volume_with_small_blocks_goes_on", Disk::Xfs, snapshots::small_blocks),
    ("snapshots::a_volume_in_use_is_not_copied", Disk::Ext4, snapshots::torn),
    ("crash::kills_between_stage_and_publish", Disk::Ext4, crash::kills),
    ("crash::a_damaged_record_keeps_nothing_mounted", Disk::Ext4, crash::damaged),
    ("crash::half_made_volumes_are_made_again", Disk::Ext4, crash::half_made),
];
