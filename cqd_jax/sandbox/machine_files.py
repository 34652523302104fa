"""What a machine of its own has beside the host's programs: folders, accounts, settings. They are not the host's."""

ENVIRONMENT = {
  "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
  "HOME": "/root",
  "HOSTNAME": "machine",
}
"""What programs of the machine find, as in a container."""

FOLDERS = {
  "/root": 0o700,
  "/tmp": 0o1777,
  "/var/tmp": 0o1777,
  "/run/lock": 0o1777,
  "/var/mail": 0o2775,
  **dict.fromkeys(
    (
      *("/boot", "/dev", "/etc/default", "/etc/skel", "/home", "/media", "/mnt", "/opt", "/proc", "/srv", "/sys"),
      *("/var/backups", "/var/cache/apt/archives", "/var/lib/misc", "/var/local", "/var/log", "/var/opt"),
      *("/var/spool/cron/crontabs", "/var/spool/mail"),
      *(f"/usr/local/{name}" for name in ("bin", "etc", "games", "include", "lib", "sbin", "share", "src")),
    ),
    0o755,
  ),
}
"""Modes by path."""

_USERS = (
  "root:0:0:/root:/bin/bash",
  *("daemon:1:1:/usr/sbin", "bin:2:2:/bin", "sys:3:3:/dev", "sync:4:65534:/bin", "games:5:60:/usr/games"),
  *("man:6:12:/var/cache/man", "lp:7:7:/var/spool/lpd", "mail:8:8:/var/mail", "news:9:9:/var/spool/news"),
  *("proxy:13:13:/bin", "www-data:33:33:/var/www", "backup:34:34:/var/backups", "nobody:65534:65534:/nonexistent"),
)
_GROUPS = (
  *("root:0", "daemon:1", "bin:2", "sys:3", "adm:4", "tty:5", "disk:6", "lp:7", "mail:8", "news:9", "man:12"),
  *("proxy:13", "kmem:15", "dialout:20", "cdrom:24", "sudo:27", "audio:29", "www-data:33", "backup:34"),
  *("shadow:42", "utmp:43", "video:44", "staff:50", "games:60", "users:100", "nogroup:65534"),
)


def _passwd() -> str:
  lines = []
  for user in _USERS:
    name, number, group, home, *shell = user.split(":")
    lines.append(f"{name}:x:{number}:{group}:{name}:{home}:{(shell or ['/usr/sbin/nologin'])[0]}\n")
  return "".join(lines)


_PAM = """\
auth sufficient pam_rootok.so
auth required pam_unix.so
account required pam_unix.so
password required pam_unix.so
session required pam_permit.so
"""

_LOGIN_DEFS = """\
MAIL_DIR /var/mail
UID_MIN 1000
UID_MAX 60000
GID_MIN 1000
GID_MAX 60000
UMASK 022
USERGROUPS_ENAB yes
ENCRYPT_METHOD SHA512
ENV_SUPATH PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENV_PATH PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games
"""

_APT = """\
#!/bin/sh
# There is no network here: what is installed can be installed again or removed, nothing else.
kept=/var/cache/apt/archives
action= names=
for word; do
  case $word in -*) ;; *) if [ "$action" ]; then names="$names $word"; else action=$word; fi ;; esac
done
case $action in
install)
  for name in $names; do
    if [ -e "$kept/$name" ]; then
      mv "$kept/$name" "$(cat "$kept/$name.path")"
    elif ! command -v "$name" >/dev/null && [ ! -d "/usr/share/doc/$name" ]; then
      echo "E: Unable to locate package $name" >&2
      exit 100
    fi
    echo "$name is already the newest version."
  done ;;
remove|purge)
  for name in $names; do
    if path=$(command -v "$name"); then
      echo "$path" >"$kept/$name.path" && mv "$path" "$kept/$name"
    fi
  done ;;
esac
exit 0
"""

FILES = {
  "/etc/passwd": (0o644, _passwd()),
  "/etc/shadow": (0o640, "".join(f"{user.split(':')[0]}:*:19000:0:99999:7:::\n" for user in _USERS)),
  "/etc/group": (0o644, "".join(f"{name}:x:{number}:\n" for name, number in (g.split(":") for g in _GROUPS))),
  "/etc/gshadow": (0o640, "".join(f"{group.split(':')[0]}:*::\n" for group in _GROUPS)),
  "/etc/shells": (0o644, "/bin/sh\n/bin/bash\n/bin/dash\n"),
  "/etc/hostname": (0o644, "machine\n"),
  "/etc/hosts": (0o644, "127.0.0.1 localhost machine\n::1 localhost\n"),
  "/etc/nsswitch.conf": (0o644, "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"),
  "/etc/login.defs": (0o644, _LOGIN_DEFS),
  "/etc/default/useradd": (0o644, "SHELL=/bin/sh\n"),
  "/etc/environment": (0o644, ""),
  "/etc/fstab": (0o644, ""),
  "/etc/crontab": (0o644, "SHELL=/bin/sh\n"),
  "/etc/sudoers": (0o440, "Defaults env_reset\nroot ALL=(ALL:ALL) ALL\n%sudo ALL=(ALL:ALL) ALL\n"),
  "/etc/profile": (0o644, "umask 022\n"),
  "/etc/bash.bashrc": (0o644, ""),
  "/etc/skel/.profile": (0o644, '[ -z "$BASH_VERSION" ] || [ ! -f ~/.bashrc ] || . ~/.bashrc\n'),
  "/etc/skel/.bashrc": (0o644, "case $- in *i*) ;; *) return ;; esac\n"),
  "/root/.profile": (0o644, '[ -z "$BASH_VERSION" ] || [ ! -f ~/.bashrc ] || . ~/.bashrc\n'),
  "/root/.bashrc": (0o644, "# settings of root's shell\n"),
  "/var/log/lastlog": (0o664, ""),
  **{f"/etc/pam.d/{name}": (0o644, _PAM) for name in ("other", "su", "su-l", "sudo", "runuser", "runuser-l")},
  **{f"/usr/local/bin/{name}": (0o755, _APT) for name in ("apt", "apt-get")},
}
"""Modes and texts by path."""

SHADOW = 42
OWNERS = {"/etc/shadow": (0, SHADOW), "/etc/gshadow": (0, SHADOW)}
"""Users and groups by path; of all else it is root."""

HOSTS_FILES = ("/etc/services", "/etc/protocols", "/etc/debian_version", "/etc/lsb-release", "/etc/mime.types")
"""What is the same everywhere, of the host."""
