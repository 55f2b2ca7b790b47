// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices of an image.

use super::*;

#[test]
fn finds_images_by_identity() {
    let Some(mut daemon) = Daemon::start() else { return };
    let (image, bound) = (daemon.image("a.img"), daemon.image("b.img"));
    daemon.image("other.img");
    fs::hard_link(&image, image.with_file_name("hard.img")).unwrap();
    fs::hard_link(&bound, image.with_file_name("hard-b.img")).unwrap();
    std::os::unix::fs::symlink(&image, image.with_file_name("link.img")).unwrap();
    ok(&daemon.run(0, &["attach", "a.img"]));
    daemon.tenant(PLAIN, "p");
    daemon.bindings.to(&bound, rustix::fs::makedev(259, 7000));
    for name in ["a.img", "./hard.img", "link.img"] {
        let found = daemon.json(0, &["find", name]);
        assert_eq!(found["devices"][0]["device"]["path"], "/run/fake/default/loop0", "{name}");
        assert_eq!(
            (found["devices"].as_array().unwrap().len(), &found["pools"]),
            (1, &serde_json::json!([]))
        );
    }
    for uid in [0, PLAIN] {
        let found = daemon.run(uid, &["find", "hard-b.img"]);
        assert_eq!(row(ok(&found), "pool")[..3], ["pool", "65534.p", "loop0"]);
        assert_eq!(found.out.lines().count(), 2, "{found:?}");
    }
    fails(&daemon.run(0, &["find", "other.img"]), 3, "other.img has no device");
    fails(&daemon.run(PLAIN, &["find", "a.img"]), 3, "no device that this user can see");
    fails(&daemon.run(0, &["find", "none.img"]), 3, "none.img does not exist");
    // A removed path still matches.
    fs::remove_file(&image).unwrap();
    assert_eq!(daemon.json(0, &["find", "a.img"])["devices"][0]["device"]["number"], 0);
}

#[test]
fn detaches_an_image_with_one_device() {
    let Some(mut daemon) = Daemon::start() else { return };
    let (image, bound) = (daemon.image("a.img"), daemon.image("b.img"));
    fs::hard_link(&image, image.with_file_name("hard.img")).unwrap();
    daemon.image("other.img");
    ok(&daemon.run(0, &["attach", "a.img"]));
    assert_eq!(ok(&daemon.run(0, &["detach", "hard.img"])), "/run/fake/default/loop0\n");
    fails(&daemon.run(0, &["detach", "a.img"]), 3, "a.img is not attached");
    ok(&daemon.run(0, &["attach", "-r", "a.img"]));
    ok(&daemon.run(0, &["attach", "-r", "a.img"]));
    let says = "a.img is attached as default/loop0, default/loop1; give one of these device names";
    fails(&daemon.run(0, &["detach", "a.img"]), 2, says);
    // A file with the name of a device does not hide the device.
    fs::create_dir(image.with_file_name("default")).unwrap();
    daemon.image("default/loop1");
    assert_eq!(ok(&daemon.run(0, &["detach", "default/loop1"])), "/run/fake/default/loop1\n");
    let both = daemon.run(0, &["detach", "a.img", "default/loop9"]);
    assert_eq!((both.code, both.out.as_str()), (3, "/run/fake/default/loop0\n"), "{both:?}");

    let pid = daemon.tenant(PLAIN, "p");
    daemon.bindings.to(&bound, rustix::fs::makedev(259, 7000));
    let says = format!(
        "b.img is loop0 of private pool 65534.p (user nobody, pid {pid} (sleep)); unbind it there: \
         'loopengine losetup --pool 65534.p --detach loop0'"
    );
    fails(&daemon.run(0, &["detach", "b.img"]), 4, &says);
    fails(&daemon.run(PLAIN, &["detach", "b.img"]), 4, &says);
}
